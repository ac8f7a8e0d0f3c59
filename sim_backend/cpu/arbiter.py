"""Whose turn it is: one virtual CPU runs at a time, and hands over fairly.

Two Unicorn instances on shared memory do not see each other's LOCK prefixes as atomic, so they take turns.
"""

import threading
from collections import deque
from typing import Protocol


class Kickable(Protocol):
    """What the arbiter needs of a runner."""

    def kick(self) -> None:
        """Make the current or the next run end soon."""
        ...


class Arbiter:
    """A lock that is handed to the longest waiter, and whose waiters kick the holder."""

    __slots__ = ("_lock", "_runner", "_waiters")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: deque[threading.Lock] = deque()
        self._runner: Kickable | None = None

    def acquire(self, runner: Kickable) -> None:
        """Wait for the turn; `runner` is who the next waiter kicks."""
        if not self._lock.acquire(False):  # by position: this is on every way into a guest
            self._wait()
        self._runner = runner

    def release(self) -> None:
        """End the turn: the longest waiter has it now."""
        self._runner = None
        if self._waiters:
            try:
                self._waiters.popleft().release()  # the lock stays taken: it is the waiter's now
            except IndexError:
                self._lock.release()
        else:
            self._lock.release()

    def _wait(self) -> None:
        ticket = threading.Lock()
        ticket.acquire()
        self._waiters.append(ticket)
        # The holder may have released before it could see the ticket.
        if self._lock.acquire(blocking=False):
            self._waiters.remove(ticket)
            return
        holder = self._runner
        if holder is not None:
            holder.kick()
        try:
            while not ticket.acquire(timeout=0.002):
                if self._lock.acquire(blocking=False):  # released before the ticket was visible
                    self._waiters.remove(ticket)
                    return
                holder = self._runner  # it may have begun its run after the kick
                if holder is not None:
                    holder.kick()
        except BaseException:
            try:
                self._waiters.remove(ticket)
            except ValueError:  # handed over meanwhile: pass it on
                self.release()
            raise

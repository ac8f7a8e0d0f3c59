"""Which thread is on which logical processor: the host's scheduler, as far as KVM can see it.

A thread that executes SEAMCALLs or runs a guest is on one logical processor, and no other thread is on that one
meanwhile. Threads nest: `get` inside `get` gives the same number (get_cpu() and put_cpu() of the kernel).
"""

import threading
from typing import Final


class _Held(threading.local):
    lp: int = -1
    depth: int = 0


class LpPool:
    """Hands logical processors 0 … `count` - 1 to threads."""

    def __init__(self, count: int) -> None:
        self.count: Final = count
        self.online: Final = [True] * count
        self.waiting = 0  # threads that want a processor: a long guest run should give its own up at a tick
        self._free: Final = set(range(count))
        self._lock: Final = threading.Lock()
        self._freed: Final = threading.Condition(self._lock)
        self._held: Final = _Held()

    def get(self, preferred: int = -1) -> int:
        """Put the calling thread on a processor, `preferred` where it is free, and return its number."""
        held = self._held
        if held.depth:
            held.depth += 1
            return held.lp
        free = self._free
        with self._lock:
            if preferred in free:
                free.discard(preferred)
                lp = preferred
            else:
                while not free:
                    self._wait()
                lp = min(free)
                free.discard(lp)
        held.lp, held.depth = lp, 1
        return lp

    def _wait(self) -> None:
        self.waiting += 1
        try:
            self._freed.wait(0.05)  # bounded, so that signal handlers run
        finally:
            self.waiting -= 1

    def put(self) -> None:
        """Undo one `get` of the calling thread."""
        held = self._held
        held.depth -= 1
        if held.depth == 0:
            with self._lock:
                if self.online[held.lp]:
                    self._free.add(held.lp)
                if self.waiting:
                    self._freed.notify()

    def current(self) -> int:
        """Return the processor that the calling thread is on, or -1."""
        return self._held.lp if self._held.depth else -1

    def set_online(self, lp: int, online: bool) -> None:
        """Take a processor out of use, or bring it back; whoever is on it leaves it at its next `put`."""
        with self._lock:
            self.online[lp] = online
            if not online:
                self._free.discard(lp)
            elif self._held.lp != lp or not self._held.depth:
                self._free.add(lp)
                self._freed.notify()

"""The host's timer: ends long runs, so that Python's signal handlers and other threads get their turn."""

import os
import signal
import threading
import time
import weakref
from typing import Final, Protocol

_TICK_S: Final = 0.01
_IDLE_TICKS: Final = 50


class Runner(Protocol):
    """A CPU that may be in the middle of a run."""

    run_count: int  # counts runs
    running: bool

    def kick(self) -> None:
        """Make the current or the next run end soon."""
        ...


class Ticker:
    """One daemon thread for all CPUs. It sleeps when nothing has run for half a second.

    Starting a run costs one attribute test: ``if not ticker.awake: ticker.wake()``.
    """

    def __init__(self) -> None:
        self.awake = False
        self._runners: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, runner: Runner) -> None:
        """End the long runs of `runner` until it is garbage or forgotten."""
        with self._lock:
            self._runners.add(runner)

    def forget(self, runner: Runner) -> None:
        """Never touch `runner` again."""
        with self._lock:
            self._runners.discard(runner)

    def wake(self) -> None:
        """Start ticking."""
        self.awake = True
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    # Signals are for the threads that user space has: ours is born with all of them blocked.
                    outside = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                    try:
                        self._thread = threading.Thread(target=self._tick, name="tdxhw-ticker", daemon=True)
                        self._thread.start()
                    finally:
                        signal.pthread_sigmask(signal.SIG_SETMASK, outside)
        self._event.set()

    def forked(self) -> None:
        """Start afresh in a forked child, which has no threads."""
        self.awake = False
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._thread = None

    def _tick(self) -> None:
        seen: weakref.WeakKeyDictionary[Runner, int] = weakref.WeakKeyDictionary()
        idle = 0
        while True:
            time.sleep(_TICK_S)
            busy = False
            with self._lock:
                for runner in self._runners:
                    count = runner.run_count
                    if not runner.running:
                        continue
                    busy = True
                    if seen.get(runner) == count:
                        runner.kick()
                    seen[runner] = count
            idle = 0 if busy else idle + 1
            if idle >= _IDLE_TICKS:
                self._event.clear()
                self.awake = False
                # A run that found us awake before that line has set `running` before it looked.
                if any(runner.running for runner in list(self._runners)):
                    self.awake = True
                    continue
                self._event.wait()
                seen.clear()
                idle = 0


TICKER: Final = Ticker()
os.register_at_fork(after_in_child=TICKER.forked)

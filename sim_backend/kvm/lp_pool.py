"""Which thread is on which logical processor: the host's scheduler, as far as KVM can see it.

A thread that executes SEAMCALLs or runs a guest is on one logical processor, and no other thread is on that one
meanwhile. Threads nest: `get` inside `get` gives the same number (get_cpu() and put_cpu() of the kernel).

The way in and out takes no lock: a set gives an element to one thread only. The lock is for what is rare, waiting for
a processor and taking one out of use.
"""

import threading
from typing import Final


class _Held(threading.local):
    lp: int = -1
    nested: int = 0  # `get`s inside the first


class LpPool:
    """Hands logical processors 0 … `count` - 1 to threads."""

    def __init__(self, count: int) -> None:
        self.count: Final = count
        self.online: Final = [True] * count
        self.waiting = 0  # threads that want a processor: a long guest run should give its own up at a tick
        self._free: Final = set(range(count))
        self._parked: Final[set[int]] = set()  # out of use, and nobody is on them
        self._lock: Final = threading.Lock()
        self._freed: Final = threading.Condition(self._lock)
        self._held: Final = _Held()

    def get(self, preferred: int = -1) -> int:
        """Put the calling thread on a processor, `preferred` where it is free, and return its number."""
        held = self._held
        if held.lp >= 0:
            held.nested += 1
            return held.lp
        try:
            self._free.remove(preferred)
        except KeyError:
            preferred = self._take_any()
        held.lp = preferred
        return preferred

    def _take_any(self) -> int:
        with self._lock:
            self.waiting += 1  # before looking: a `put` that this look misses notifies
            try:
                while True:
                    try:
                        lp = min(self._free)
                        self._free.remove(lp)
                    except (ValueError, KeyError):
                        self._freed.wait(0.05)  # bounded, so that signal handlers run
                    else:
                        return lp
            finally:
                self.waiting -= 1

    def put(self) -> None:
        """Undo one `get` of the calling thread."""
        held = self._held
        if held.nested:
            held.nested -= 1
            return
        lp = held.lp
        held.lp = -1
        offered = self.online[lp]
        if offered:
            self._free.add(lp)
        if self.waiting or not self.online[lp] or not offered:
            self._settle(lp, offered)

    def _settle(self, lp: int, offered: bool) -> None:
        """Park a processor that went out of use while somebody was on it; wake who waits for one."""
        with self._lock:
            if self.online[lp]:
                if not offered:
                    self._free.add(lp)
            elif not offered:
                self._parked.add(lp)
            else:
                self._park(lp)
            self._freed.notify()

    def _park(self, lp: int) -> None:
        if lp in self._free:
            try:
                self._free.remove(lp)
            except KeyError:  # somebody was quicker, and leaves it at its next `put`
                return
            self._parked.add(lp)

    def current(self) -> int:
        """Return the processor that the calling thread is on, or -1."""
        return self._held.lp

    def set_online(self, lp: int, online: bool) -> None:
        """Take a processor out of use, or bring it back; whoever is on it leaves it at its next `put`."""
        with self._lock:
            self.online[lp] = online
            if not online:
                self._park(lp)
            elif lp in self._parked:
                self._parked.remove(lp)
                self._free.add(lp)
                self._freed.notify()

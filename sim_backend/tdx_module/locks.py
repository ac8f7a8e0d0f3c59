"""The module's locks: plain shared/exclusive ones, and those that let the host go first.

A leaf runs to its end before another begins, so a lock that is taken and released within one leaf is only *tried*:
what a try leaves behind (a reader count, a host-priority flag) is what taking and releasing would leave behind.
Locks that outlive a leaf (a TD is running) or that one leaf may want twice (PAMT entries) are really taken.

Lock words are those of the module: plain: bit 0 exclusive, 15:1 readers; host-priority: bit 0 exclusive,
bit 1 HOST_PRIORITY, 15:2 readers. PAMT entries hold the second kind in their bits 15:0 (see pamt.py).
A shared acquisition that fails leaves its reader counted; an exclusive release forgets all readers.
"""

from enum import IntEnum
from typing import Final

EXCLUSIVE: Final = 1
READER: Final = 2
HOST_PRIORITY: Final = 2
HP_READER: Final = 4
_WORD: Final = 0xFFFF


class GuestTry(IntEnum):
    """What a guest's attempt on a host-priority lock comes to."""

    ACQUIRED = 0
    BUSY = 1
    BUSY_HOST_PRIORITY = 2  # the host failed on this lock before and has not got it since


class SharexLock:
    """A plain shared/exclusive lock."""

    __slots__ = ("raw",)

    def __init__(self) -> None:
        self.raw = 0

    def acquire_shared(self) -> bool:
        """Count a reader; False when a writer holds the lock (the reader stays counted)."""
        before = self.raw
        self.raw = (before + READER) & _WORD
        return not before & EXCLUSIVE

    def acquire_exclusive(self) -> bool:
        """Become the writer; False when anybody holds the lock."""
        if self.raw:
            return False
        self.raw = EXCLUSIVE
        return True

    def release_shared(self) -> None:
        """Uncount a reader."""
        self.raw = (self.raw - READER) & _WORD

    def release_exclusive(self) -> None:
        """Free the lock, readers that failed meanwhile included."""
        self.raw = 0

    def try_shared(self) -> bool:
        """Acquire and release as a reader."""
        if self.raw & EXCLUSIVE:
            self.raw = (self.raw + READER) & _WORD
            return False
        return True

    def try_exclusive(self) -> bool:
        """Acquire and release as the writer."""
        return not self.raw


class HostPriorityLock:
    """A shared/exclusive lock on which a guest yields to a host that failed."""

    __slots__ = ("raw",)

    def __init__(self) -> None:
        self.raw = 0

    def acquire_shared(self) -> bool:
        """Host: count a reader; False when a writer holds the lock (HOST_PRIORITY is set, the reader stays)."""
        before = self.raw
        if before & EXCLUSIVE:
            self.raw = (before + HP_READER) & _WORD | HOST_PRIORITY
            return False
        self.raw = (before & ~HOST_PRIORITY) + HP_READER & _WORD
        return True

    def acquire_exclusive(self) -> bool:
        """Host: become the writer; False (HOST_PRIORITY is set) when anybody holds the lock."""
        if self.raw & ~HOST_PRIORITY:
            self.raw |= HOST_PRIORITY
            return False
        self.raw = EXCLUSIVE
        return True

    def release_shared(self) -> None:
        """Uncount a reader."""
        self.raw = (self.raw - HP_READER) & _WORD

    def release_exclusive(self) -> None:
        """Free the lock; only HOST_PRIORITY survives."""
        self.raw &= HOST_PRIORITY

    def try_shared(self) -> bool:
        """Host: acquire and release as a reader."""
        raw = self.raw
        if not raw:
            return True
        if raw & EXCLUSIVE:
            self.raw = (raw + HP_READER) & _WORD | HOST_PRIORITY
            return False
        self.raw = raw & ~HOST_PRIORITY
        return True

    def try_exclusive(self) -> bool:
        """Host: acquire and release as the writer."""
        raw = self.raw
        if not raw:
            return True
        if raw & ~HOST_PRIORITY:
            self.raw = raw | HOST_PRIORITY
            return False
        self.raw = 0
        return True

    def guest_try_shared(self) -> GuestTry:
        """Guest: acquire and release as a reader."""
        raw = self.raw
        if raw & HOST_PRIORITY:
            return GuestTry.BUSY_HOST_PRIORITY
        if raw & EXCLUSIVE:
            self.raw = (raw + HP_READER) & _WORD
            return GuestTry.BUSY
        return GuestTry.ACQUIRED

    def guest_try_exclusive(self) -> GuestTry:
        """Guest: acquire and release as the writer."""
        if self.raw == 0:
            return GuestTry.ACQUIRED
        return GuestTry.BUSY_HOST_PRIORITY if self.raw == HOST_PRIORITY else GuestTry.BUSY

"""The pool of private host key ids that TDs draw from."""

import threading
from typing import Final


class HkidPool:
    """Hands out `count` HKIDs from `first`, lowest free one first, as the kernel's IDA does.

    The global HKID that encrypts TDRs is not part of it.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first: Final = first
        self.count: Final = count
        self._free: Final = set(range(first, first + count))
        self._leaked: Final[set[int]] = set()
        self.limit = count  # how many may be taken at once: fewer than `count` when others use them too
        self._lock: Final = threading.Lock()

    def alloc(self) -> int | None:
        """Return the lowest free HKID, or None when all are taken (ENOSPC)."""
        with self._lock:
            if not self._free or self.count - len(self._free) >= self.limit:
                return None
            hkid = min(self._free)
            self._free.remove(hkid)
            return hkid

    def free(self, hkid: int) -> None:
        """Return `hkid` to the pool."""
        with self._lock:
            self._free.add(hkid)

    def leak(self, hkid: int) -> None:
        """Give `hkid` up for good: the module could not be made to release it."""
        with self._lock:
            self._leaked.add(hkid)

    @property
    def available(self) -> int:
        """How many HKIDs are free."""
        return len(self._free)

    @property
    def leaked(self) -> frozenset[int]:
        """The HKIDs that were given up."""
        return frozenset(self._leaked)

"""The host's page allocator: 4 KiB pages of simulated RAM, handed out one at a time.

Stands for `alloc_page()` of the kernel: KVM takes TD control pages, Secure-EPT pages, shared EPT pages
and guest_memfd pages from here, and everything must be back when the last VM is gone.
"""

import threading
from collections.abc import Iterable
from typing import Final

from sim_backend.hw.memory import PAGE_SIZE, PhysicalMemory


class OutOfMemory(Exception):  # noqa: N818 - the kernel's word for it is ENOMEM, not an error class
    """No free page is left; the ioctl boundary turns it into ENOMEM."""


class HostPages:
    """Allocates from `ranges` (start, end) of HPAs [bytes, 4 KiB-aligned, end exclusive], ascending.

    A freed page is reused first, as a kernel's per-CPU list does, so a small working set stays small in
    a big host. `limit_pages` caps how many may be in use at once, for out-of-memory tests.
    """

    def __init__(self, memory: PhysicalMemory, ranges: Iterable[tuple[int, int]]) -> None:
        self._memory: Final = memory
        self._ranges: Final = [(start, end) for start, end in ranges if start < end]
        for start, end in self._ranges:
            if start % PAGE_SIZE or end % PAGE_SIZE or end > memory.ram_bytes:
                raise ValueError(f"{start:#x}..{end:#x} is no page range of {memory.ram_bytes:#x} bytes of RAM")
        self.total_pages: Final = sum(end - start for start, end in self._ranges) // PAGE_SIZE
        self.limit_pages = self.total_pages
        self.in_use = 0
        self.leaked: Final[set[int]] = set()
        self._free: list[int] = []
        self._range_index = 0
        self._next, self._end = self._ranges[0] if self._ranges else (0, 0)
        self._lock: Final = threading.Lock()

    def alloc(self) -> int:
        """Return the HPA of a page with undefined contents; raise `OutOfMemory`."""
        with self._lock:
            if self.in_use >= self.limit_pages:
                raise OutOfMemory
            self.in_use += 1
            if self._free:
                return self._free.pop()
            if self._next == self._end:
                self._range_index += 1
                self._next, self._end = self._ranges[self._range_index]
            hpa = self._next
            self._next = hpa + PAGE_SIZE
            return hpa

    def alloc_zeroed(self) -> int:
        """Return the HPA of a page full of zeros; raise `OutOfMemory`."""
        hpa = self.alloc()
        self._memory.zero_page(hpa)
        return hpa

    def alloc_many(self, count: int) -> list[int]:
        """Return `count` zeroed pages, or none at all and raise `OutOfMemory`."""
        pages: list[int] = []
        try:
            pages.extend(self.alloc_zeroed() for _ in range(count))
        except OutOfMemory:
            for page in pages:
                self.free(page)
            raise
        return pages

    def leak(self, hpa: int) -> None:
        """Give `hpa` up: the TDX module still owns it, so it must never be handed out again."""
        self.leaked.add(hpa)

    def free_pages(self) -> set[int]:
        """Return the HPAs that were given back and not handed out again."""
        with self._lock:
            return set(self._free)

    def free(self, hpa: int) -> None:
        """Give the page at `hpa` back; one that was given up stays in use for good."""
        if hpa in self.leaked:
            return
        with self._lock:
            self.in_use -= 1
            self._free.append(hpa)

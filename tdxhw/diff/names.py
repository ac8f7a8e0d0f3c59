"""Names for what is only a number in one process: descriptors and host-virtual addresses.

``vm0``, ``vcpu1`` are descriptors, numbered per kind in order of creation; ``buf0+0x1000`` is an address in the first
buffer that a call named. A test starts with a new set, so that its names do not depend on the tests before it.
"""

import os
from typing import Final

from uapi_ctypes.units import PAGE_SIZE

_LOWEST_POINTER: Final = 0x1_0000
"""`vm.mmap_min_addr` of every distribution: what is below is a number, or deliberately no address."""
_USER_END: Final = 1 << 47
_CALLERS: Final = "the caller's memory"


class Names:
    """The names of one test's objects."""

    def __init__(self) -> None:
        self._fds: dict[int, str] = {}
        self._buffers: list[tuple[int, int, str]] = []
        self._counts: dict[str, int] = {}
        self.slots: dict[tuple[str, int], int] = {}
        """Size [bytes] of the memslots by VM and slot: how long a dirty bitmap is."""

    def created(self, kind: str, fd: int) -> str:
        """Name the new descriptor `fd`, an object of `kind`."""
        name = self._fds[fd] = self._next(kind)
        return name

    def of_fd(self, fd: int) -> str | int:
        """Return the name of `fd`; one that this test closed keeps it until the number is used again."""
        known = self._fds.get(fd)
        if known is not None:
            return known
        if fd <= 2 or not _is_open(fd):  # standard streams may be anything; a closed number says itself
            return fd
        return self.created("file", fd)

    def of_address(self, address: int, length: int = 0) -> str | int:
        """Return the name of the HVA `address` [bytes].

        With a `length` [bytes] it is in a buffer of pages, numbered when it is first named, and its offset matters.
        Without one it may be in such a buffer; else it is where an allocator put a structure of the caller's.
        """
        if not _LOWEST_POINTER <= address < _USER_END:
            return address
        for base, size, name in self._buffers:
            if base <= address < base + size:
                return f"{name}+{address - base:#x}"
        if not length:
            return _CALLERS
        base = address & -PAGE_SIZE
        name = self._next("buf")
        self._buffers.append((base, address - base + length, name))
        return f"{name}+{address - base:#x}"

    def _next(self, kind: str) -> str:
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        return f"{kind}{number}"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        return False
    return True

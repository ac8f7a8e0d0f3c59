"""Shared memory with a kernel: mappings whose views can never dangle.

A ctypes overlay on a bare mmap would crash the process when it is touched after munmap. Here `close` replaces
the pages by anonymous zero pages, which unpins the file at once, and the address range itself is given back
when the last view is gone.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final, Self

from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import CData

PROT_READ: Final = 1
PROT_WRITE: Final = 2
MAP_SHARED: Final = 1
MAP_PRIVATE: Final = 2
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_mmap: Final = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_munmap: Final = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map(address: int, length: int, flags: int, fd: int) -> int:
    """Map read-write and return the HVA, or raise `KvmError`."""
    got = _mmap(address, length, PROT_READ | PROT_WRITE, flags, fd, 0)
    if got is None or got == _MAP_FAILED:
        raise KvmError("mmap", ctypes.get_errno())
    return int(got)


class _Range:
    """An address range; unmapped when nothing refers to it any more."""

    __slots__ = ("_unmap", "address", "length")

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self._unmap: Callable[[int, int], int] = _munmap  # still there when the interpreter shuts down

    def __del__(self) -> None:
        self._unmap(self.address, self.length)


class Mapping:
    """A read-write mapping of this process; satisfies `kernel.KernelMapping`."""

    __slots__ = ("_closed", "_range", "address", "length")

    def __init__(self, length: int, *, fd: int = -1, flags: int = MAP_SHARED) -> None:
        """Map `length` [bytes] of `fd` from its start, or anonymous memory without one."""
        if fd < 0:
            flags |= MAP_ANONYMOUS
        self.address = _map(0, length, flags, fd)
        self.length = length
        self._range = _Range(self.address, length)
        self._closed = False

    @property
    def memory(self) -> memoryview:
        """The bytes, writable, without a copy."""
        return memoryview(self.view(ctypes.c_ubyte * self.length)).cast("B")

    def view(self, layout: type[CData], offset: int = 0) -> CData:
        """Overlay `layout` at `offset` [bytes], without a copy. Raise ``ValueError`` past the end."""
        if self._closed:
            raise ValueError("the mapping is closed")
        if offset < 0 or offset + ctypes.sizeof(layout) > self.length:
            raise ValueError(f"{layout.__name__} at {offset:#x} does not fit in {self.length:#x} bytes")
        made: Any = layout.from_address(self.address + offset)
        made._pinned_range = self._range  # noqa: SLF001 -- the view keeps its addresses alive
        view: CData = made
        return view

    def close(self) -> None:
        """Unmap. Idempotent. Views that are still held stay safe to touch and read zeros."""
        if self._closed:
            return
        self._closed = True
        _map(self.address, self.length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1)
        del self._range

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def anonymous(length: int) -> Mapping:
    """Return `length` [bytes] of zeroed memory of this process, 4 KiB-aligned: what backs a memslot."""
    return Mapping(length, flags=MAP_PRIVATE | MAP_NORESERVE)

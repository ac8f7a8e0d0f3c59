"""User memory that TCG touches directly, and the check that it is still there.

User space may unmap memory behind a memslot at any time. KVM has MMU notifiers; TCG would take the whole
process down. So pages are probed when they enter the TLB, and all of them again, in one system call, before
each run.
"""

import ctypes
import functools
import mmap
import os
from typing import Final

_libc = ctypes.CDLL(None)
_readv: Final = _libc.process_vm_readv
_readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
_readv.restype = ctypes.c_ssize_t
_madvise: Final = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_IOV_MAX: Final = 1024


class _Iovec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_size_t), ("iov_len", ctypes.c_size_t))


_sink = (ctypes.c_char * _IOV_MAX)()
_sink_iovec: Final = _Iovec(ctypes.addressof(_sink), _IOV_MAX)
_SINK: Final = ctypes.addressof(_sink_iovec)


@functools.cache
def _kernel_populates() -> bool:
    """Tell whether this kernel has MADV_POPULATE_WRITE (Linux 5.14)."""
    with mmap.mmap(-1, 4096) as page:
        anchor = ctypes.c_char.from_buffer(page)
        supported = int(_madvise(ctypes.addressof(anchor), 4096, _MADV_POPULATE_WRITE)) == 0
        del anchor
    return supported


def page_is_usable(hva: int, write: bool) -> bool:
    """Tell whether the page at `hva` may be read (or written), and make it present.

    A kernel before 5.14 cannot tell whether a page may be written; then reading has to do.
    """
    if _kernel_populates():
        return int(_madvise(hva, 4096, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ)) == 0
    return _all_readable((_Iovec * 1)(_Iovec(hva, 1)), 1)


def _all_readable(pages: "ctypes.Array[_Iovec]", count: int) -> bool:
    address = ctypes.addressof(pages)
    pid = os.getpid()
    for first in range(0, count, _IOV_MAX):
        number = min(_IOV_MAX, count - first)
        if _readv(pid, _SINK, 1, address + 16 * first, number, 0) != number:
            return False
    return True


class UserPages:
    """The user pages that a TLB may hold: `pages`, by HVA."""

    __slots__ = ("_vector", "pages")

    def __init__(self) -> None:
        self.pages: set[int] = set()
        self._vector: ctypes.Array[_Iovec] | None = None

    def __contains__(self, hva: int) -> bool:
        return hva in self.pages

    def add(self, hva: int) -> None:
        """Note the page at `hva`."""
        if hva not in self.pages:
            self.pages.add(hva)
            self._vector = None

    def clear(self) -> None:
        """Forget all pages."""
        self.pages.clear()
        self._vector = None

    def all_there(self) -> bool:
        """Tell whether every page can still be read."""
        if self._vector is None:
            self._vector = (_Iovec * len(self.pages))(*[_Iovec(hva, 1) for hva in self.pages])
        return _all_readable(self._vector, len(self.pages))

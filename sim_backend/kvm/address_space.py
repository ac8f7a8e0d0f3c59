"""User memory as the kernel sees it: copy_from_user and copy_to_user, which fail instead of crashing.

The model never follows a user pointer itself. `OwnProcess` copies through process_vm_readv(2), because
the simulator lives in the process that it serves and a bad pointer there must be EFAULT, not SIGSEGV.
"""

import ctypes
import errno
import os
from functools import cache
from typing import Final, Protocol

from sim_backend.kvm.errors import Errno


class AddressSpace(Protocol):
    """An address space (the kernel's ``mm``). Compared by identity: a VM belongs to the one that created it."""

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes at `address`; raise ``Errno(EFAULT)`` when any of them cannot be read."""
        ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`; raise ``Errno(EFAULT)`` when some cannot be stored (the readable start may be changed)."""
        ...

    def fault_in(self, address: int, length: int, write: bool) -> bool:
        """Make the pages present with that permission, as get_user_pages() would; False where it would fail."""
        ...

    def maps_writable(self, address: int) -> bool:
        """Tell whether the page is present and writable already: then a read fault maps it writable too."""
        ...

    def pointer(self, address: int, length: int) -> int:
        """Return an HVA in this process where a CPU may map the same bytes, or 0 when there is none."""
        ...


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("length", ctypes.c_size_t))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_TRANSFER_ARGUMENTS: Final = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_readv: Final = _libc.process_vm_readv
_readv.argtypes = _TRANSFER_ARGUMENTS
_readv.restype = ctypes.c_ssize_t
_writev: Final = _libc.process_vm_writev
_writev.argtypes = _TRANSFER_ARGUMENTS
_writev.restype = ctypes.c_ssize_t
_madvise: Final = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int
_MADV_POPULATE_READ: Final = 22  # Linux 5.14
_MADV_POPULATE_WRITE: Final = 23
_PAGEMAP_EXCLUSIVE: Final = 1 << 56
_PAGEMAP_FILE: Final = 1 << 61
_TASK_SIZE: Final = 1 << 47  # 4-level user half; the last page is never mappable


@cache
def _pagemap(pid: int) -> int:
    return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


class OwnProcess:
    """This process's memory."""

    def __init__(self) -> None:
        self.pid: Final = os.getpid()

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes at `address`; raise ``Errno(EFAULT)`` when any of them cannot be read."""
        if length == 0:
            return b""
        if address < 4096 or address + length > _TASK_SIZE:
            raise Errno(errno.EFAULT)
        buffer = ctypes.create_string_buffer(length)
        local = _Iovec(ctypes.addressof(buffer), length)
        remote = _Iovec(address, length)
        if _readv(self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != length:
            raise Errno(errno.EFAULT)
        return buffer.raw

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`; raise ``Errno(EFAULT)`` when some cannot be stored (the readable start may be changed)."""
        length = len(data)
        if length == 0:
            return
        if address < 4096 or address + length > _TASK_SIZE:
            raise Errno(errno.EFAULT)
        source = ctypes.create_string_buffer(bytes(data), length)
        local = _Iovec(ctypes.addressof(source), length)
        remote = _Iovec(address, length)
        if _writev(self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != length:
            raise Errno(errno.EFAULT)

    def fault_in(self, address: int, length: int, write: bool) -> bool:
        """Make the pages present with that permission, as get_user_pages() would; False where it would fail."""
        return bool(_madvise(address, length, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ) == 0)

    def maps_writable(self, address: int) -> bool:
        """Tell whether the page is present and writable already: then a read fault maps it writable too."""
        data = os.pread(_pagemap(self.pid), 8, address >> 12 << 3)
        entry = int.from_bytes(data, "little")
        # Present, and either nobody else's (the zero page is everybody's) or shared memory.
        return bool(entry >> 63 and entry & (_PAGEMAP_EXCLUSIVE | _PAGEMAP_FILE))

    def pointer(self, address: int, length: int) -> int:
        """Return `address`: the CPU model runs in this process."""
        return address if address + length <= _TASK_SIZE else 0

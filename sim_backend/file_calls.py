"""System calls that a KVM descriptor answers like any file: read, write, lseek, ftruncate, fstat, mmap.

A simulated descriptor is a memfd, which would allow more than the real anonymous inodes do; these refuse as they do.
"""

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any, Final

from sim_backend.fds import OpenFile
from sim_backend.kernel import SimKernel
from sim_backend.kvm.guest_memfd import GUEST_MEMFD_FLAG_MMAP, GuestMemfd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import Kernel

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
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
PROT_EXEC: Final = 4
MAP_PRIVATE: Final = 2
_MAP_TYPE: Final = 15
_MAP_TYPES: Final = (1, MAP_PRIVATE, 3)  # MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE
_TASK_SIZE: Final = (1 << 47) - 4096  # [bytes]
_SEEK_MAX: Final = 4  # SEEK_HOLE
_MODES: Final = {"kvm": 0o20660, "kvm-gmem": 0o100600}
_ANONYMOUS_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class RawMapping:
    """A mapping by address, without views."""

    address: int  # HVA
    length: int  # [bytes]

    def close(self) -> None:
        """Unmap it."""
        _munmap(self.address, self.length)


class FileCalls:
    """The calls, on either kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel: Final = kernel

    def _simulated(self, fd: int) -> OpenFile | None:
        kernel = self._kernel
        return kernel.fds.files.get(fd) if isinstance(kernel, SimKernel) else None

    def read(self, fd: int, length: int) -> bytes:
        """Read; EINVAL on a KVM descriptor other than statistics."""
        file = self._simulated(fd)
        if file is not None and file.kind != "kvm-stats":
            raise KvmError("read", errno.EINVAL)
        try:
            return os.read(fd, length)
        except OSError as error:
            raise KvmError("read", error.errno or errno.EIO) from None

    def write(self, fd: int, data: bytes) -> int:
        """Write; EINVAL on every KVM descriptor."""
        if self._simulated(fd) is not None:
            raise KvmError("write", errno.EINVAL)
        try:
            return os.write(fd, data)
        except OSError as error:
            raise KvmError("write", error.errno or errno.EIO) from None

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """Seek: a guest_memfd cannot, the others stay where they are."""
        file = self._simulated(fd)
        if file is not None:
            if not 0 <= whence <= _SEEK_MAX:
                raise KvmError("lseek", errno.EINVAL)
            if file.kind == "kvm-gmem":
                raise KvmError("lseek", errno.ESPIPE)
            return 0
        try:
            return os.lseek(fd, offset, whence)
        except OSError as error:
            raise KvmError("lseek", error.errno or errno.EIO) from None

    def ftruncate(self, fd: int, length: int) -> None:
        """Truncate; EINVAL on every KVM descriptor."""
        if self._simulated(fd) is not None:
            raise KvmError("ftruncate", errno.EINVAL)
        try:
            os.ftruncate(fd, length)
        except OSError as error:
            raise KvmError("ftruncate", error.errno or errno.EIO) from None

    def fstat(self, fd: int) -> dict[str, Any]:
        """Return size, mode, blocks, blksize and nlink."""
        file = self._simulated(fd)
        if file is None:
            try:
                stat = os.fstat(fd)
            except OSError as error:
                raise KvmError("fstat", error.errno or errno.EIO) from None
            size, mode, blocks = stat.st_size, stat.st_mode, stat.st_blocks
            return {
                "size": size,
                "mode": oct(mode),
                "blocks": blocks,
                "blksize": stat.st_blksize,
                "nlink": stat.st_nlink,
            }
        size = file.object.size if isinstance(file.object, GuestMemfd) else 0
        mode = _MODES.get(file.kind, _ANONYMOUS_MODE)
        return {"size": size, "mode": oct(mode), "blocks": 0, "blksize": 4096, "nlink": 1}

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> RawMapping:
        """Map with any protection and flags; anonymous memory for `fd` -1."""
        file = self._simulated(fd)
        if file is not None:
            if offset & 0xFFF or not length:
                raise KvmError("mmap", errno.EINVAL)
            if length > _TASK_SIZE:
                raise KvmError("mmap", errno.ENOMEM)  # an address range is looked for before the file is asked
            self._check_mmap(file, prot, flags)
        address = _mmap(None, length, prot, flags, fd, offset)
        if address is None or address == _MAP_FAILED:
            raise KvmError("mmap", ctypes.get_errno())
        return RawMapping(int(address), length)

    @staticmethod
    def _check_mmap(file: OpenFile, prot: int, flags: int) -> None:
        if flags & _MAP_TYPE not in _MAP_TYPES:
            raise KvmError("mmap", errno.EINVAL)
        if prot & PROT_EXEC and file.kind != "kvm":
            raise KvmError("mmap", errno.EPERM)
        if isinstance(file.object, GuestMemfd):
            if not file.object.flags & GUEST_MEMFD_FLAG_MMAP:
                raise KvmError("mmap", errno.ENODEV)
            if flags & MAP_PRIVATE:
                raise KvmError("mmap", errno.EINVAL)
        elif file.kind != "kvm-vcpu":
            raise KvmError("mmap", errno.ENODEV)

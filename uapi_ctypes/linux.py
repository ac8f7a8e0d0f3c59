"""`LinuxKernel`: the real system calls."""

import ctypes
import errno
import os
from fcntl import ioctl as _fcntl_ioctl
from typing import Final

from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import name_of
from uapi_ctypes.kernel import IoctlArg
from uapi_ctypes.mapping import Mapping

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc_ioctl: Final = _libc.ioctl
_libc_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc_fallocate: Final = _libc.fallocate
_libc_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_get_errno: Final = ctypes.get_errno
_addressof: Final = ctypes.addressof

_OPEN_REMEDIES: Final = {
    errno.ENOENT: "load kvm_intel (`modprobe kvm_intel`) and enable virtualisation in the firmware",
    errno.ENODEV: "load kvm_intel (`modprobe kvm_intel`) and enable virtualisation in the firmware",
    errno.EACCES: "join its group (`ls -l /dev/kvm` shows it, mostly `sudo usermod -aG kvm $USER`, then log in again)",
    errno.EPERM: "the sandbox or container does not pass it on: add --device /dev/kvm or the like",
}


class LinuxKernel:
    """The kernel this process runs on."""

    name = "linux"

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        """Open `path` and return the file descriptor. For /dev/kvm the error says what to do."""
        try:
            return os.open(path, flags)
        except OSError as error:
            err = error.errno or errno.EIO
            remedy = _OPEN_REMEDIES.get(err, "") if path == "/dev/kvm" else ""
            raise KvmError(f"open {path}", err, remedy=remedy) from None

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        """Issue `request` and return its non-negative result. Never retried: EINTR is the caller's."""
        if isinstance(arg, int):
            if 0 <= arg <= 0x7FFF_FFFF:
                # fcntl.ioctl is twice as fast as ctypes, but its integers are C ints.
                try:
                    return _fcntl_ioctl(fd, request, arg)
                except OSError as error:
                    raise KvmError(name_of(request), error.errno or errno.EIO) from None
                except ValueError:  # a negative file descriptor: Python does not ask the kernel
                    raise KvmError(name_of(request), errno.EBADF) from None
            address = arg & 0xFFFF_FFFF_FFFF_FFFF
        else:
            # By address: fcntl.ioctl would hand the kernel a copy of anything up to 1 KiB.
            address = _addressof(arg)
        result = _libc_ioctl(fd, request, address)
        if result < 0:
            raise KvmError(name_of(request), _get_errno())
        return int(result)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Reserve or punch space from `offset` on [bytes]; the flags are those of the system call."""
        if _libc_fallocate(fd, mode, offset, length) < 0:
            raise KvmError("fallocate", _get_errno())

    def mmap(self, fd: int, length: int) -> Mapping:
        """Map `length` [bytes] of `fd` from its start, shared, readable and writable."""
        return Mapping(length, fd=fd)

    def close(self, fd: int) -> None:
        """Close `fd`; the last close of a KVM object destroys it."""
        try:
            os.close(fd)
        except OSError as error:
            raise KvmError("close", error.errno or errno.EIO) from None

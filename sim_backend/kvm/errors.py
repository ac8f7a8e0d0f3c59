"""How the inside of the KVM model fails: an errno, light enough to be raised on every refused call."""

from typing import Final

from uapi_ctypes.errors import BackendLimit


class Errno(Exception):  # noqa: N818 - the kernel's word: a negative return value
    """A negative return value on its way to the ioctl boundary, where it becomes `KvmError`.

    `hw_error` carries the SEAMCALL status that user space will find in ``kvm_tdx_cmd.hw_error``, for the
    message only: the write-back itself is done by whoever owns the command structure.
    """

    def __init__(self, errno: int, hw_error: int = 0) -> None:
        super().__init__(errno)
        self.errno = errno
        self.hw_error = hw_error


_MAX_ERRNO: Final = 4095


def as_int(value: int) -> int:
    """Return a 32-bit result as user space's int; one that looks like an error number is taken for one."""
    value &= 0xFFFF_FFFF
    if value >> 31:
        value -= 1 << 32
        if -value <= _MAX_ERRNO:
            raise Errno(-value)
    return value


class SimLimit(BackendLimit):
    """The simulator cannot go on without inventing an answer: which instruction, register or feature it met."""


class NotModelled(SimLimit):
    """The call exists in the kernel and the model does not have it; the message names it."""

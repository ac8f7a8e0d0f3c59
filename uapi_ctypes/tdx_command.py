"""KVM_MEMORY_ENCRYPT_OP with a TDX sub-command: the one place that fills in ``struct kvm_tdx_cmd``."""

import ctypes
from typing import Any, Final

from uapi_ctypes.dialect import Command, Dialect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.handle import Handle
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import IoctlArg

_MEMORY_ENCRYPT_OP: Final = int(KvmRequest.KVM_MEMORY_ENCRYPT_OP)


def memory_encrypt_op(handle: Handle, dialect: Dialect, cmd: IoctlArg) -> int:
    """Issue `cmd` on `handle`: a command structure, any other structure, or a bare address.

    When the structure is the dialect's own, `KvmError.request` is the sub-command's name and
    `KvmError.hw_error` what the kernel stored in it.
    """
    if not isinstance(cmd, dialect.cmd):
        return handle.ioctl(_MEMORY_ENCRYPT_OP, cmd)
    tdx_cmd: Any = cmd
    given = tdx_cmd.hw_error
    try:
        return handle.ioctl(_MEMORY_ENCRYPT_OP, cmd)
    except KvmError as error:
        stored = tdx_cmd.hw_error
        raise KvmError(
            dialect.command_name(tdx_cmd.id),
            error.errno or 0,
            hw_error=stored if stored != given else error.hw_error,
            remedy=error.remedy,
        ) from None


def tdx_command(
    handle: Handle,
    dialect: Dialect,
    command: Command,
    data: int | ctypes.Structure = 0,
    flags: int = 0,
) -> None:
    """Issue `command` on `handle`. `data` is a structure, passed by address, or an immediate."""
    cmd: Any = dialect.cmd()
    cmd.id = command.id
    cmd.flags = flags
    cmd.data = data if isinstance(data, int) else ctypes.addressof(data)
    memory_encrypt_op(handle, dialect, cmd)

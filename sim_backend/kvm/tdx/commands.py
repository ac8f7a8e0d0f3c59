"""KVM_MEMORY_ENCRYPT_OP on a TD: which sub-command runs, behind which checks and locks (mainline dialect)."""

import errno
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.capabilities import tdx_get_capabilities
from sim_backend.kvm.tdx.finalize_vm import tdx_td_finalize
from sim_backend.kvm.tdx.get_cpuid import tdx_vcpu_get_cpuid
from sim_backend.kvm.tdx.init_mem_region import tdx_vcpu_init_mem_region
from sim_backend.kvm.tdx.init_vcpu import tdx_vcpu_init
from sim_backend.kvm.tdx.init_vm import tdx_td_init
from sim_backend.kvm.tdx.td import TdState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm

KVM_TDX_CAPABILITIES: Final = 0
KVM_TDX_INIT_VM: Final = 1
KVM_TDX_INIT_VCPU: Final = 2
KVM_TDX_INIT_MEM_REGION: Final = 3
KVM_TDX_FINALIZE_VM: Final = 4
KVM_TDX_GET_CPUID: Final = 5

_CMD: Final = struct.Struct("<IIQQ")


class TdxCmd(NamedTuple):
    """``struct kvm_tdx_cmd`` as user space passed it; v17 calls the last field ``error``."""

    id: int
    flags: int
    data: int
    hw_error: int


def read_cmd(vm: "Vm", argp: int) -> TdxCmd:
    """Read the command. Raise ``Errno(EFAULT)``, or ``Errno(EINVAL)`` when ``hw_error`` is not zero."""
    cmd = TdxCmd(*_CMD.unpack(vm.mm.read(argp, _CMD.size)))
    if cmd.hw_error:
        raise Errno(errno.EINVAL)
    return cmd


def write_back(vm: "Vm", argp: int, cmd: TdxCmd, hw_error: int) -> None:
    """Return the command to user space with the module's status in it; raise ``Errno(EFAULT)``."""
    vm.mm.write(argp, _CMD.pack(cmd.id, cmd.flags, cmd.data, hw_error))


@contextmanager
def locked(vm: "Vm") -> Iterator[None]:
    """Hold kvm->lock, every vCPU's mutex and slots_lock: nothing else happens to the VM meanwhile.

    Raise ``Errno(EBUSY)`` where this kernel does so while a vCPU is being created.
    """
    with vm.lock:
        in_flight = vm.created_vcpus != len(vm.vcpus)
        if in_flight and vm.host.profile.behaves("tdx_vcpu_creation_in_flight_is_ebusy"):
            raise Errno(errno.EBUSY)
        vm.lock_all_vcpus()
        try:
            with vm.slots_lock:
                yield
        finally:
            vm.unlock_all_vcpus()


def run_and_write_back(vm: "Vm", argp: int, cmd: TdxCmd, command: Callable[[], int]) -> int:
    """Run `command` and write the command structure back whether it failed or not.

    The status written is the one that the command's ``Errno`` carries, else 0.
    """
    try:
        result = command()
    except Errno as error:
        write_back(vm, argp, cmd, error.hw_error)
        raise
    write_back(vm, argp, cmd, 0)
    return result


_VM_COMMANDS: Final[Mapping[int, Callable[["TdxOps", TdxCmd], int]]] = MappingProxyType(
    {KVM_TDX_INIT_VM: tdx_td_init, KVM_TDX_FINALIZE_VM: tdx_td_finalize}
)
_VCPU_COMMANDS: Final[Mapping[int, Callable[["TdxOps", "Vcpu", TdxCmd], int]]] = MappingProxyType(
    {KVM_TDX_INIT_VCPU: tdx_vcpu_init, KVM_TDX_INIT_MEM_REGION: tdx_vcpu_init_mem_region}
)


def tdx_vm_ioctl(ops: "TdxOps", argp: int) -> int:
    """KVM_MEMORY_ENCRYPT_OP on the VM fd (`tdx_vm_ioctl()`)."""
    vm = ops.vm
    cmd = read_cmd(vm, argp)
    if not ops.host.profile.behaves("tdx_command_locks_all_vcpus"):
        with vm.lock:
            return _vm_command(ops, argp, cmd)
    if cmd.id == KVM_TDX_CAPABILITIES:
        # Without locks, and the structure is not written back.
        tdx_get_capabilities(ops, cmd)
        return 0
    with locked(vm):
        return _vm_command(ops, argp, cmd)


def _vm_command(ops: "TdxOps", argp: int, cmd: TdxCmd) -> int:
    if cmd.id == KVM_TDX_CAPABILITIES and ops.host.profile.behaves("tdx_capabilities_written_back"):
        return run_and_write_back(ops.vm, argp, cmd, lambda: tdx_get_capabilities(ops, cmd))
    command = _VM_COMMANDS.get(cmd.id)
    if command is None:
        raise Errno(errno.EINVAL)
    with ops.vm.slots_lock:
        return run_and_write_back(ops.vm, argp, cmd, lambda: command(ops, cmd))


def tdx_vcpu_unlocked_ioctl(ops: "TdxOps", vcpu: "Vcpu", argp: int) -> int | None:
    """Handle the vCPU commands that lock the whole VM themselves; None passes the command on."""
    if not ops.host.profile.behaves("tdx_command_locks_all_vcpus"):
        return None
    cmd = read_cmd(ops.vm, argp)
    with locked(ops.vm):
        _check_being_built(ops)
        command = _VCPU_COMMANDS.get(cmd.id)
        if command is None:
            return None
        with ops.loaded(vcpu):
            return command(ops, vcpu, cmd)


def tdx_vcpu_ioctl(ops: "TdxOps", vcpu: "Vcpu", argp: int) -> int:
    """Handle the rest under the vCPU's mutex (`tdx_vcpu_ioctl()`). The command is never written back."""
    _check_being_built(ops)
    cmd = read_cmd(ops.vm, argp)
    if cmd.id == KVM_TDX_GET_CPUID:
        return tdx_vcpu_get_cpuid(ops, vcpu, cmd)
    command = _VCPU_COMMANDS.get(cmd.id)
    if command is None or ops.host.profile.behaves("tdx_command_locks_all_vcpus"):
        raise Errno(errno.EINVAL)
    with ops.vm.slots_lock:
        return command(ops, vcpu, cmd)


def _check_being_built(ops: "TdxOps") -> None:
    if ops.td.hkid == 0 or ops.td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)

"""KVM_MEMORY_ENCRYPT_OP on a TD's VM fd in v17: only kvm->lock is held, and every command is written back."""

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.commands import (
    KVM_TDX_CAPABILITIES,
    KVM_TDX_FINALIZE_VM,
    KVM_TDX_INIT_MEM_REGION,
    KVM_TDX_INIT_VM,
    TdxCmd,
    read_cmd,
    run_and_write_back,
)
from sim_backend.kvm.tdx.seamcalls import SUCCESS
from sim_backend.kvm.tdx.td import TdState
from sim_backend.kvm.tdx.td_control import reclaim_page, release_hkid
from sim_backend.kvm.tdx.v17.capabilities import tdx_get_capabilities
from sim_backend.kvm.tdx.v17.init_mem_region import tdx_init_mem_region
from sim_backend.kvm.tdx.v17.init_vm import tdx_td_init

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps

KVM_TDX_RELEASE_VM: Final = 5


def tdx_vm_ioctl(ops: "TdxOps", argp: int) -> int:
    """Run the command that `argp` names. Raise ``Errno``: EFAULT, EINVAL, and the command's own."""
    vm = ops.vm
    cmd = read_cmd(vm, argp)
    command = _COMMANDS.get(cmd.id)
    with vm.lock:
        if command is None:
            raise Errno(errno.EINVAL)
        with vm.slots_lock:
            return run_and_write_back(vm, argp, cmd, lambda: command(ops, cmd))


def tdx_td_finalize(ops: "TdxOps", cmd: TdxCmd) -> int:
    """Issue TDH.MR.FINALIZE. Raise ``Errno``: EINVAL, or EIO, which neither bugs the VM nor fills the error."""
    del cmd
    td = ops.td
    if td.hkid == 0 or td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)
    with ops.on_lp() as lp:
        if ops.host.seamcalls.mr_finalize(lp, td.tdr) != SUCCESS:
            raise Errno(errno.EIO)
    td.state = TdState.RUNNABLE
    return 0


def tdx_release_vm(ops: "TdxOps", cmd: TdxCmd) -> int:
    """Give the key id back while the VM lives on, then drop every mapping. Never fails, never checks."""
    del cmd
    release_hkid(ops)
    ops.zap_gfn_range(0, 1 << 52, private=True, shared=True)
    if ops.td.mirror is not None and not ops.td.hkid:
        with ops.on_lp() as lp:
            for page in ops.td.mirror.drop_tables():
                reclaim_page(ops, lp, page)
    return 0


_COMMANDS: Final[Mapping[int, Callable[["TdxOps", TdxCmd], int]]] = MappingProxyType(
    {
        KVM_TDX_CAPABILITIES: tdx_get_capabilities,
        KVM_TDX_INIT_VM: tdx_td_init,
        KVM_TDX_INIT_MEM_REGION: tdx_init_mem_region,
        KVM_TDX_FINALIZE_VM: tdx_td_finalize,
        KVM_TDX_RELEASE_VM: tdx_release_vm,
    }
)

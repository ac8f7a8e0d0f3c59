"""KVM_TDX_INIT_VCPU of v17."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm import msrs
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.commands import KVM_TDX_INIT_VCPU, read_cmd
from sim_backend.kvm.tdx.init_vcpu import configure_posted_interrupts, create_vcpu, set_x2apic_base
from sim_backend.kvm.tdx.td import TdState
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

_MTRR_ENABLED_WRITE_BACK: Final = 0x806


def tdx_vcpu_ioctl(ops: "TdxOps", vcpu: "Vcpu", argp: int) -> int:
    """KVM_MEMORY_ENCRYPT_OP on a vCPU fd: there is one command, and it is never written back."""
    vendor, td = vcpu.vendor, ops.td
    if vendor.initialized:
        raise Errno(errno.EINVAL)
    if td.hkid == 0 or td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)
    cmd = read_cmd(ops.vm, argp)
    if cmd.flags or cmd.id != KVM_TDX_INIT_VCPU:
        raise Errno(errno.EINVAL)
    set_x2apic_base(vcpu)
    vcpu.msrs[msrs.MSR_MTRR_DEF_TYPE] = _MTRR_ENABLED_WRITE_BACK
    create_vcpu(ops, vcpu, cmd.data)
    configure_posted_interrupts(ops, vcpu)
    vendor.initialized = True
    vcpu.mp_state = MpState.RUNNABLE
    return 0

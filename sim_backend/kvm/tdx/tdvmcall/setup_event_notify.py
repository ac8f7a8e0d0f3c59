"""TDG.VP.VMCALL<SetupEventNotifyInterrupt>: the vector by which user space will notify the guest."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R12
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.tdx.tdvmcall.get_quote import RET_U64, complete_simple
from sim_backend.kvm.tdx.tdvmcall.get_td_vmcall_info import KVM_EXIT_TDX
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND, SUBFUNC_UNSUPPORTED

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

SETUP_EVENT_NOTIFY_INTERRUPT: Final = 0x10004


def tdvmcall_setup_event_notify_interrupt(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = vector, 32 to 255."""
    del ops
    vector = regs[R12]
    if not 32 <= vector <= 255:
        regs[R10] = INVALID_OPERAND
        return True
    words = vcpu.run.u64
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_TDX
    words[UNION_U64], words[UNION_U64 + 1] = 0, SETUP_EVENT_NOTIFY_INTERRUPT
    words[RET_U64], words[UNION_U64 + 3] = SUBFUNC_UNSUPPORTED, vector
    vcpu.complete_userspace_io = lambda: complete_simple(vcpu)
    return False

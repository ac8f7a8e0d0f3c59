"""Instruction.HLT: sleep in the kernel until an event."""

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R12
from sim_backend.kvm.tdx.interrupts import has_events
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu


def tdvmcall_hlt(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Halt the vCPU unless an event is pending; R12 ≠ 0: interrupts are blocked (`kvm_emulate_halt_noskip()`)."""
    vcpu.vendor.halt_interrupts_blocked = bool(regs[R12])
    if has_events(ops, vcpu):
        vcpu.pv_unhalted = False
    else:
        vcpu.mp_state = MpState.HALTED
    return True

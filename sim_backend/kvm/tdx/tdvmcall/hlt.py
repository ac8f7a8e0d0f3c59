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
    vcpu.counters["halt_exits"] += 1
    vcpu.set_mp_state(MpState.RUNNABLE if has_events(ops, vcpu) else MpState.HALTED)
    return True

"""Instruction.CPUID: the answer comes from the table of KVM_SET_CPUID2, not from the module."""

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R12, R13, R14, R15

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu


def tdvmcall_cpuid(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = function, R13 = index; EAX to EDX return in R12 to R15 (`tdx_emulate_cpuid()`)."""
    del ops
    function, index = regs[R12] & 0xFFFF_FFFF, regs[R13] & 0xFFFF_FFFF
    regs[R12], regs[R13], regs[R14], regs[R15] = vcpu.cpuid.cpuid(function, index)
    return True

"""Instruction.RDMSR and Instruction.WRMSR: the MSRs that KVM keeps for a TD."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION, UNION_U32, UNION_U64
from sim_backend.kvm.msrs import MsrRefused, MsrUnknown
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_MSR_EXIT_REASON_INVAL: Final = 1
KVM_MSR_EXIT_REASON_FILTER: Final = 4
_ERROR_U8: Final = UNION
_REASON_U32: Final = UNION_U32 + 2
_INDEX_U32: Final = UNION_U32 + 3
_DATA_U64: Final = UNION_U64 + 2


def tdvmcall_rdmsr(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = index; the value returns in R11 (`kvm_emulate_rdmsr()`)."""
    index = regs[R12] & 0xFFFF_FFFF
    reason = KVM_MSR_EXIT_REASON_FILTER
    if _allowed(vcpu, index, write=False):
        try:
            regs[R11] = ops.get_msr(vcpu, index, host_initiated=False)
        except (MsrUnknown, MsrRefused):
            reason = KVM_MSR_EXIT_REASON_INVAL
        else:
            return True
    if _to_user_space(ops, vcpu, KVM_EXIT_X86_RDMSR, reason, index, 0):
        vcpu.complete_userspace_io = lambda: _complete_rdmsr(vcpu)
        return False
    regs[R10] = INVALID_OPERAND
    regs[R11] = 0
    return True


def tdvmcall_wrmsr(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = index, R13 = value (`kvm_emulate_wrmsr()`)."""
    index, value = regs[R12] & 0xFFFF_FFFF, regs[R13]
    reason = KVM_MSR_EXIT_REASON_FILTER
    if _allowed(vcpu, index, write=True):
        try:
            ops.set_msr(vcpu, index, value, host_initiated=False)
        except (MsrUnknown, MsrRefused):
            reason = KVM_MSR_EXIT_REASON_INVAL
        else:
            return True
    if _to_user_space(ops, vcpu, KVM_EXIT_X86_WRMSR, reason, index, value):
        vcpu.complete_userspace_io = lambda: _complete_wrmsr(vcpu)
        return False
    regs[R10] = INVALID_OPERAND
    return True


def _allowed(vcpu: "Vcpu", index: int, *, write: bool) -> bool:
    msr_filter = vcpu.vm.msr_filter
    return msr_filter is None or msr_filter.allows(index, write)


def _to_user_space(ops: "TdxOps", vcpu: "Vcpu", exit_reason: int, reason: int, index: int, value: int) -> bool:
    if ops.host.is_v17 or not vcpu.vm.user_space_msr_mask & reason:
        return False
    run = vcpu.run
    run.u32[EXIT_REASON] = exit_reason
    run.u64[UNION_U64] = 0  # error and its padding
    run.u32[_REASON_U32] = reason
    run.u32[_INDEX_U32] = index
    run.u64[_DATA_U64] = value
    return True


def _complete_rdmsr(vcpu: "Vcpu") -> bool:
    regs = vcpu.vendor.regs
    if vcpu.run.u8[_ERROR_U8]:
        regs[R10] = INVALID_OPERAND
    else:
        regs[R11] = vcpu.run.u64[_DATA_U64]
    return True


def _complete_wrmsr(vcpu: "Vcpu") -> bool:
    if vcpu.run.u8[_ERROR_U8]:
        vcpu.vendor.regs[R10] = INVALID_OPERAND
    return True

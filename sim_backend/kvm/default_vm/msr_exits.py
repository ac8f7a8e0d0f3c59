"""RDMSR and WRMSR of an ordinary guest: the filter, user-space MSRs, #GP (`kvm_emulate_rdmsr`)."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.hw.gprs import RAX, RCX, RDX
from sim_backend.kvm.default_vm.guest_events import GP, raise_in_guest, skip_instruction
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION, UNION_U32, UNION_U64
from sim_backend.kvm.msrs import MsrRefused, MsrUnknown

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_MSR_EXIT_REASON_INVAL: Final = 1
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 2
KVM_MSR_EXIT_REASON_FILTER: Final = 4
_U32: Final = 0xFFFF_FFFF


def emulate_rdmsr(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """RDMSR: from KVM, from user space, or #GP."""
    index = cpu.gprs[RCX] & _U32
    try:
        _check_filter(vcpu, index, write=False)
        value = vcpu.vm.ops.get_msr(vcpu, index, False)
    except _Refusal as refusal:
        reason = refusal.reason
    except MsrUnknown:
        reason = KVM_MSR_EXIT_REASON_UNKNOWN
    except MsrRefused:
        reason = KVM_MSR_EXIT_REASON_INVAL
    else:
        _set_result(cpu, value)
        skip_instruction(vcpu, cpu)
        return True
    if not vcpu.vm.user_space_msr_mask & reason:
        return raise_in_guest(vcpu, cpu, GP)

    def complete() -> bool:
        if vcpu.run.u8[UNION]:
            return raise_in_guest(vcpu, cpu, GP)
        _set_result(cpu, vcpu.run.u64[UNION_U64 + 2])
        skip_instruction(vcpu, cpu)
        return True

    return _exit_msr(vcpu, KVM_EXIT_X86_RDMSR, reason, index, 0, complete)


def emulate_wrmsr(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """WRMSR: to KVM, to user space, or #GP."""
    index = cpu.gprs[RCX] & _U32
    value = cpu.gprs[RAX] & _U32 | (cpu.gprs[RDX] & _U32) << 32
    try:
        _check_filter(vcpu, index, write=True)
        vcpu.vm.ops.set_msr(vcpu, index, value, False)
    except _Refusal as refusal:
        reason = refusal.reason
    except MsrUnknown:
        reason = KVM_MSR_EXIT_REASON_UNKNOWN
    except MsrRefused:
        reason = KVM_MSR_EXIT_REASON_INVAL
    else:
        skip_instruction(vcpu, cpu)
        return True
    if not vcpu.vm.user_space_msr_mask & reason:
        return raise_in_guest(vcpu, cpu, GP)

    def complete() -> bool:
        if vcpu.run.u8[UNION]:
            return raise_in_guest(vcpu, cpu, GP)
        skip_instruction(vcpu, cpu)
        return True

    return _exit_msr(vcpu, KVM_EXIT_X86_WRMSR, reason, index, value, complete)


class _Refusal(Exception):  # noqa: N818 - an outcome
    def __init__(self, reason: int) -> None:
        self.reason = reason


def _check_filter(vcpu: "Vcpu", index: int, *, write: bool) -> None:
    msr_filter = vcpu.vm.msr_filter
    if msr_filter is not None and not msr_filter.allows(index, write):
        raise _Refusal(KVM_MSR_EXIT_REASON_FILTER)


def _exit_msr(vcpu: "Vcpu", kind: int, reason: int, index: int, data: int, complete: object) -> bool:
    run = vcpu.run
    run.u32[EXIT_REASON] = kind
    run.u8[UNION : UNION + 8] = bytes(8)
    run.u32[UNION_U32 + 2] = reason
    run.u32[UNION_U32 + 3] = index
    run.u64[UNION_U64 + 2] = data
    vcpu.complete_userspace_io = complete  # type: ignore[assignment]
    return False


def _set_result(cpu: Cpu, value: int) -> None:
    cpu.gprs[RAX], cpu.gprs[RDX] = value & _U32, value >> 32

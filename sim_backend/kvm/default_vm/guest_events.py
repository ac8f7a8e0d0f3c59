"""Two things that every exit handler does: step over the instruction, or make it fault."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

VALID: Final = 1 << 31
ERROR_CODE_VALID: Final = 1 << 11
TYPE_HARDWARE_EXCEPTION: Final = 3 << 8
UD: Final = 6
SS: Final = 12
GP: Final = 13
RFLAGS_RF: Final = 1 << 16
_NO_FAULTS: Final = frozenset({1, 3, 4, 8, 18})  # #DB, the traps #BP and #OF, the aborts #DF and #MC
_CR0_PE: Final = 1
_HAS_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
_U32: Final = 0xFFFF_FFFF


def is_fault(vector: int) -> bool:
    """Tell whether the exception sets RF in the RFLAGS that it saves (`kvm_check_and_inject_events`)."""
    return vector not in _NO_FAULTS


def raise_in_guest(vcpu: "Vcpu", cpu: Cpu, vector: int, error_code: int = 0) -> bool:
    """Make the guest take an exception instead of completing its instruction; return True (go on)."""
    with_code = vector in _HAS_ERROR_CODE and bool(cpu.get_state().cr0 & _CR0_PE)  # real mode has none
    exception = vcpu.exception
    exception.vector, exception.has_error_code, exception.error_code = vector, with_code, error_code
    if is_fault(vector):
        cpu.rflags |= RFLAGS_RF
    cpu.inject(VALID | TYPE_HARDWARE_EXCEPTION | vector | (ERROR_CODE_VALID if with_code else 0), error_code)
    return True


def skip_instruction(vcpu: "Vcpu", cpu: Cpu) -> None:
    """Advance RIP over the instruction that exited; an interrupt shadow ends with it."""
    rip = cpu.rip + cpu.exit.instruction_length
    cpu.rip = rip if cpu.in_64bit_mode() else rip & _U32
    vcpu.shadow_over, vcpu.interrupt_shadow = True, 0

"""KVM_SET_GUEST_DEBUG and the NMI window, both by stepping: one instruction, then a look around.

Hardware breakpoints are compared with RIP before every instruction. An NMI blocks others until IRET, which no exit
reports; while one is in service the guest is stepped, so that the IRET is seen.
"""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.kvm.errors import NotModelled
from sim_backend.kvm.guest_paging import read_guest, translate
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_DEBUG: Final = 4
DB: Final = 1
DR6_FIXED: Final = 0xFFFF_0FF0
DR6_SINGLE_STEP: Final = 1 << 14
_RFLAGS_TF: Final = 1 << 8
_DR7_FIXED: Final = 0x400
_DEBUG_ADDRESSES: Final = 4
_IRET: Final = 0xCF
_PREFIXES: Final = frozenset({0x66, *range(0x40, 0x50)})


class Stepping:
    """What one step was begun with."""

    __slots__ = ("at_iret", "breakpoints", "guest_traps", "rip", "saved_bitmap", "stops_here")

    def __init__(self, cpu: Cpu) -> None:
        self.rip = cpu.rip
        self.guest_traps = bool(cpu.rflags & _RFLAGS_TF)  # the guest steps itself
        self.saved_bitmap: int = cpu.exception_bitmap
        self.at_iret = False
        self.breakpoints = 0
        self.stops_here = False

    def end(self, cpu: Cpu) -> None:
        """Take the trap flag and the interception of #DB back."""
        if not self.guest_traps:
            cpu.rflags &= ~_RFLAGS_TF
        cpu.exception_bitmap = self.saved_bitmap
        cpu.steps = False


def begin_step(vcpu: "Vcpu", cpu: Cpu) -> Stepping:
    """Prepare to execute one instruction; `stops_here` when a breakpoint is on it."""
    step = Stepping(cpu)
    step.breakpoints = _breakpoints_at(vcpu, cpu)
    if step.breakpoints and vcpu.resume_rip != cpu.rip:
        vcpu.resume_rip = cpu.rip  # the next run passes it, as RFLAGS.RF would let it
        step.stops_here = True
        return step
    vcpu.resume_rip = -1
    if vcpu.nmi_masked:
        step.at_iret = _is_iret(vcpu, cpu)
    cpu.steps = not step.guest_traps
    cpu.rflags |= _RFLAGS_TF
    cpu.exception_bitmap |= 1 << DB
    return step


def stepped(vcpu: "Vcpu", cpu: Cpu, step: Stepping) -> bool:
    """Act on the #DB that ended a step."""
    if step.at_iret:
        vcpu.nmi_masked = False
    if vcpu.single_step:
        return debug_exit(vcpu, cpu, DB, DR6_SINGLE_STEP)
    if step.guest_traps:
        cpu.inject(cpu.exit.interruption_info)
    return True


def debug_exit(vcpu: "Vcpu", cpu: Cpu, vector: int, dr6: int) -> bool:
    """Exit with KVM_EXIT_DEBUG."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_DEBUG
    run.u32[UNION_U32], run.u32[UNION_U32 + 1] = vector, 0
    run.u64[UNION_U64 + 1] = _linear_rip(cpu)
    dr7 = vcpu.vm.host.profile.debug_exit_dr7
    if dr7 and vcpu.uses_hardware_breakpoints():
        dr7 = vcpu.guest_debug_registers[7] | _DR7_FIXED
    run.u64[UNION_U64 + 2] = DR6_FIXED | dr6 if vector == DB else 0
    run.u64[UNION_U64 + 3] = dr7 if vector == DB else 0
    return False


def _linear_rip(cpu: Cpu) -> int:
    return cpu.rip if cpu.in_64bit_mode() else cpu.get_state().cs.base + cpu.rip & 0xFFFF_FFFF


def _breakpoints_at(vcpu: "Vcpu", cpu: Cpu) -> int:
    """Return the DR6 bits of the enabled execution breakpoints at RIP."""
    if not vcpu.uses_hardware_breakpoints():
        return 0
    registers = vcpu.guest_debug_registers
    dr7, linear = registers[7], _linear_rip(cpu)
    if any(dr7 >> 2 * index & 3 and dr7 >> (16 + 4 * index) & 3 for index in range(_DEBUG_ADDRESSES)):
        raise NotModelled(f"data and I/O breakpoints of KVM_SET_GUEST_DEBUG (DR7 {dr7:#x})")
    return sum(
        1 << index
        for index in range(_DEBUG_ADDRESSES)
        if dr7 >> 2 * index & 3 and not dr7 >> (16 + 4 * index) & 3 and registers[index] == linear
    )


def _is_iret(vcpu: "Vcpu", cpu: Cpu) -> bool:
    physical = translate(vcpu, _linear_rip(cpu))
    code = read_guest(vcpu.vm, physical, 2) if physical is not None else None
    if not code:
        return False
    return code[0] == _IRET or (code[0] in _PREFIXES and code[1] == _IRET)

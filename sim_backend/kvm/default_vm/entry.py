"""One entry into an ordinary guest and what its exit leads to (`vcpu_enter_guest`, `vmx_handle_exit`)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.cpu.engine import Cpu, ExitReason
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX
from sim_backend.kvm.default_vm.attempt import AR_BIG
from sim_backend.kvm.default_vm.control_registers import emulate_control_register, emulate_xsetbv
from sim_backend.kvm.default_vm.debugging import DB, DR6_SINGLE_STEP, begin_step, debug_exit, stepped
from sim_backend.kvm.default_vm.emulator import at_string_io, emulate_instruction, exit_information
from sim_backend.kvm.default_vm.guest_events import (
    ERROR_CODE_VALID,
    GP,
    RFLAGS_RF,
    TYPE_HARDWARE_EXCEPTION,
    UD,
    VALID,
    is_fault,
    raise_in_guest,
    skip_instruction,
)
from sim_backend.kvm.default_vm.hypercalls import hypercall_instruction
from sim_backend.kvm.default_vm.mmu import MmioFault
from sim_backend.kvm.default_vm.msr_exits import emulate_rdmsr, emulate_wrmsr
from sim_backend.kvm.default_vm.port_io import emulate_port_io
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, REQUEST_INTERRUPT_WINDOW, UNION_U32, UNION_U64
from sim_backend.kvm.registers import CR0_PE
from sim_backend.kvm.vcpu import MpState
from sim_backend.kvm.vcpu_reset import reset_vcpu

if TYPE_CHECKING:
    from sim_backend.kvm.default_vm.ops import DefaultVmOps
    from sim_backend.kvm.vcpu import Vcpu

ExitHandler: TypeAlias = Callable[["DefaultVmOps", "Vcpu", Cpu], bool]

KVM_EXIT_HLT: Final = 5
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4

_TYPE_EXTERNAL: Final = 0 << 8
_TYPE_NMI: Final = 2 << 8
_TYPE_SOFTWARE_INTERRUPT: Final = 4 << 8
_TYPE_SOFTWARE_EXCEPTION: Final = 6 << 8
_TYPE_MASK: Final = 7 << 8
_NMI_VECTOR: Final = 2
_WRITE: Final = 2
_FETCH: Final = 4
_EXCEPTION: Final = int(ExitReason.EXCEPTION_OR_NMI)
_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
_MAY_HAVE_DONE_NOTHING: Final = frozenset({int(ExitReason.EXTERNAL_INTERRUPT), _EPT_VIOLATION})
_GUESTDBG_BLOCKIRQ: Final = 1 << 20
_U32: Final = 0xFFFF_FFFF
_U64: Final = (1 << 64) - 1


def enter_and_exit(ops: "DefaultVmOps", vcpu: "Vcpu") -> bool:
    """Enter the guest, handle its exit, and return True to go on, False to return to user space."""
    cpu = vcpu.cpu
    if cpu is None:
        raise RuntimeError("an unprotected vCPU has a CPU until its VM is destroyed")
    if vcpu.triple_fault_pending:
        vcpu.triple_fault_pending = False
        vcpu.run.u32[EXIT_REASON] = KVM_EXIT_SHUTDOWN
        return False
    vendor, mmu = vcpu.vendor, ops.mmu
    more = _inject_pending(vcpu, cpu)
    stepping = begin_step(vcpu, cpu) if more or vendor.step or vcpu.needs_stepping() else None
    if stepping is not None and stepping.stops_here:
        return debug_exit(vcpu, cpu, 1, stepping.breakpoints)
    vcpu.entries += 1
    vcpu.in_guest = True
    if vcpu.kicked:
        vcpu.in_guest = False
        if stepping is not None:
            stepping.end(cpu)
        take_back_event(vcpu, cpu)
        return True
    if vendor.generation != mmu.generation:
        vendor.generation = mmu.generation
        cpu.invalidate()
    vcpu.has_run = True
    vcpu.saved_state, vcpu.set_rflags, vcpu.shadow_over = None, -1, False
    began_at = cpu.rip
    resumed_at = began_at if cpu.rflags & RFLAGS_RF else -1
    try:
        reason = cpu.run().reason
    finally:
        vcpu.in_guest = False
        if stepping is not None:
            stepping.end(cpu)
    if reason in _MAY_HAVE_DONE_NOTHING:
        take_back_event(vcpu, cpu)
        if cpu.rip != began_at:
            vcpu.interrupt_shadow = 0
    else:
        vcpu.interrupt_shadow = 0
    vendor.step = stepping is None and reason == _EPT_VIOLATION and _fetched_ahead(cpu)
    if resumed_at >= 0 and cpu.rip != resumed_at:
        cpu.rflags &= ~RFLAGS_RF  # it lasts for one instruction, which the engine forgets
    if stepping is not None and reason == _EXCEPTION and cpu.exit.interruption_info & 0xFF == DB:
        return stepped(vcpu, cpu, stepping)
    handler = _EXITS.get(reason)
    if handler is None:
        return _unexpected(vcpu, reason)
    go_on = handler(ops, vcpu, cpu)
    if go_on and vcpu.single_step and vcpu.shadow_over:
        return debug_exit(vcpu, cpu, DB, DR6_SINGLE_STEP)  # the instruction was emulated, and so was its step
    return go_on


def _inject_pending(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Choose what is delivered at this entry: an exception, an NMI or an interrupt (kvm_check_and_inject_events).

    Return True where the entry may execute one instruction only, because there is more to deliver.
    """
    can_inject = False
    exception = vcpu.exception
    if take_back_event(vcpu, cpu):
        pass
    elif exception.pending or exception.injected:
        vector = exception.vector
        if not exception.injected and is_fault(vector):
            cpu.rflags |= RFLAGS_RF
        exception.pending, exception.injected = False, False
        kind = _TYPE_SOFTWARE_EXCEPTION if vector in (3, 4) else TYPE_HARDWARE_EXCEPTION
        information = VALID | kind | vector
        if exception.has_error_code and not cpu.get_state().cr0 & CR0_PE:
            exception.has_error_code = False  # real mode has none, and the vCPU's events show none from here on
        if exception.has_error_code:
            information |= ERROR_CODE_VALID
        cpu.inject(information, exception.error_code, 1 if vector in (3, 4) else 0)
    elif vcpu.nmi_injected:
        _inject_nmi(vcpu, cpu)
    elif vcpu.interrupt >= 0:
        # What was acknowledged already goes in whatever RFLAGS.IF says by now.
        _inject_interrupt(vcpu, cpu, vcpu.interrupt)
    else:
        can_inject = True
    step = False
    if vcpu.guest_debug & _GUESTDBG_BLOCKIRQ:
        return step
    if vcpu.nmi_pending and not vcpu.nmi_masked:
        if can_inject and not vcpu.interrupt_shadow:
            vcpu.nmi_pending -= 1
            _inject_nmi(vcpu, cpu)
            can_inject = False
        else:
            step = True  # the NMI window opens behind what goes in now, or behind the shadow
    apic, irqchip = vcpu.apic, vcpu.vm.irqchip
    wanted = bool(vcpu.run.u8[REQUEST_INTERRUPT_WINDOW]) and vcpu.wants_interrupt_window()
    if apic is not None and (
        apic.irr or vcpu.pending_external_vector >= 0 or (irqchip is not None and not irqchip.split)
    ):
        if can_inject and vcpu.interrupts_allowed(cpu) and (vector := _next_vector(vcpu)) >= 0:
            _inject_interrupt(vcpu, cpu, vector)
        wanted = wanted or vcpu.has_interrupt()
    cpu.request_interrupt_window(wanted and not vcpu.interrupt_shadow)  # the shadow is stepped over
    return step


def _inject_nmi(vcpu: "Vcpu", cpu: Cpu) -> None:
    vcpu.nmi_injected, vcpu.nmi_masked = False, True
    cpu.inject(VALID | _TYPE_NMI | _NMI_VECTOR)


def _inject_interrupt(vcpu: "Vcpu", cpu: Cpu, vector: int) -> None:
    cpu.inject(VALID | _TYPE_EXTERNAL | vector)
    vcpu.interrupt_nr, vcpu.interrupt = vector, -1


def _next_vector(vcpu: "Vcpu") -> int:
    """Take the next vector from the in-kernel controllers (kvm_cpu_get_interrupt), or -1."""
    apic, irqchip = vcpu.apic, vcpu.vm.irqchip
    if apic is None or irqchip is None:
        return -1
    if vcpu.has_external_interrupt():
        if irqchip.pic is not None:
            return irqchip.pic.acknowledge()
        vector, vcpu.pending_external_vector = vcpu.pending_external_vector, -1
        return vector
    return apic.acknowledge()


# ---- exits --------------------------------------------------------------------------------------------------


def _continue(_ops: "DefaultVmOps", _vcpu: "Vcpu", _cpu: Cpu) -> bool:
    return True


def _window(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    cpu.request_interrupt_window(False)
    del vcpu
    return True


def _skip(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    skip_instruction(vcpu, cpu)
    return True


def _undefined(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return raise_in_guest(vcpu, cpu, UD)


def _hlt(ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    skip_instruction(vcpu, cpu)
    vcpu.counters["halt_exits"] += 1
    if vcpu.apic is not None:
        vcpu.set_mp_state(MpState.RUNNABLE if ops.vcpu_has_events(vcpu) else MpState.HALTED)
        return True
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_HLT
    return False


def _cpuid(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    gprs = cpu.gprs
    vcpu.refresh_runtime_cpuid()
    gprs[RAX], gprs[RBX], gprs[RCX], gprs[RDX] = vcpu.cpuid.cpuid(gprs[RAX] & _U32, gprs[RCX] & _U32)
    skip_instruction(vcpu, cpu)
    return True


def _triple_fault(_ops: "DefaultVmOps", vcpu: "Vcpu", _cpu: Cpu) -> bool:
    if vcpu.vm.host.profile.behaves("shutdown_resets_vcpu"):
        reset_vcpu(vcpu, init_event=True)
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_SHUTDOWN
    return False


def _ept_violation(ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    exit_ = cpu.exit
    if exit_.vectoring_info:
        return _fault_in_delivery(ops, vcpu, cpu)
    ahead = vcpu.vendor.step
    if exit_.qualification & _FETCH and _fetched_past_limit(cpu):
        if ahead:
            return True
        if vcpu.vm.host.profile.behaves("ip_wraps") and cpu.rip == 0x1_0000 and not cpu.get_state().cs.ar & AR_BIG:
            cpu.rip = 0
            return True
        return raise_in_guest(vcpu, cpu, GP)
    if ops.has_private_mem and not exit_.qualification & _FETCH and at_string_io(vcpu, cpu):
        return emulate_instruction(vcpu, cpu)  # it exits as port I/O, before it touches memory
    try:
        ops.mmu.fault(vcpu, exit_.gpa, write=bool(exit_.qualification & _WRITE))
    except MmioFault:
        return True if ahead else emulate_instruction(vcpu, cpu)
    except Errno:
        if ahead:
            return True
        if not exit_.qualification & _FETCH and at_string_io(vcpu, cpu):
            return emulate_instruction(vcpu, cpu)
        raise
    vcpu.vendor.step = False
    return True


def _fault_in_delivery(ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Delivering an event touched memory that was not mapped: map it, or give up where there is none."""
    exit_ = cpu.exit
    information, exit_.vectoring_info = exit_.vectoring_info, 0
    try:
        ops.mmu.fault(vcpu, exit_.gpa, write=bool(exit_.qualification & _WRITE))
    except MmioFault:
        run = vcpu.run
        reason, information_1, information_2, *_ = exit_information(vcpu, cpu)
        words = (information_2, reason, information_1, exit_.gpa, vcpu.lp)
        run.u32[EXIT_REASON] = KVM_EXIT_INTERNAL_ERROR
        run.u32[UNION_U32] = KVM_INTERNAL_ERROR_DELIVERY_EV
        run.u32[UNION_U32 + 1] = len(words)
        for index, word in enumerate(words, UNION_U64 + 1):
            run.u64[index] = word & _U64
        cpu.inject(0)
        _requeue(vcpu, information, exit_.vectoring_error)
        return False
    return True


def take_back_event(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Queue again what the guest was to take and did not, because it was left first (`kvm_x86_cancel_injection`).

    Return True for an event of the instruction itself (INT n): that one stays where it is.
    """
    information, error_code, instruction_length = cpu.take_back()
    if information & _TYPE_MASK >= _TYPE_SOFTWARE_INTERRUPT:
        cpu.inject(information, error_code, instruction_length)
        return True
    if information:
        _requeue(vcpu, information, error_code)
    return False


def _requeue(vcpu: "Vcpu", information: int, error_code: int) -> None:
    """Keep an event whose delivery was cut short for the next entry (`svm_complete_interrupts`)."""
    kind, vector = information & _TYPE_MASK, information & 0xFF
    if kind == TYPE_HARDWARE_EXCEPTION:
        exception = vcpu.exception
        exception.pending, exception.injected, exception.vector = False, True, vector
        exception.has_error_code = bool(information & ERROR_CODE_VALID)
        exception.error_code = error_code if exception.has_error_code else 0
    elif kind == _TYPE_NMI:
        vcpu.nmi_injected, vcpu.nmi_masked = True, False
    elif kind == _TYPE_EXTERNAL:
        vcpu.interrupt = vector


def _fetched_ahead(cpu: Cpu) -> bool:
    """Tell whether the engine wanted code of the next page while the instruction at RIP may lie before it.

    It translates a run of instructions at once, across the boundary. They come first, one by one, where the next
    page cannot be fetched.
    """
    exit_ = cpu.exit
    if not exit_.qualification & _FETCH or exit_.vectoring_info:
        return False
    linear = cpu.rip if cpu.in_64bit_mode() else cpu.get_state().cs.base + cpu.rip & _U32
    return linear >> 12 != exit_.gla >> 12


def _fetched_past_limit(cpu: Cpu) -> bool:
    """Tell whether the instruction runs over the end of CS, which the engine does not notice by itself."""
    if cpu.in_64bit_mode():
        return False
    cs = cpu.get_state().cs
    return (cpu.exit.gla - cs.base) & 0xFFFF_FFFF > cs.limit


def _exception(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    information = cpu.exit.interruption_info
    vector = information & 0xFF
    if information & _TYPE_MASK == _TYPE_NMI:
        return True
    if vector == UD:
        handled = hypercall_instruction(vcpu, cpu)
        return raise_in_guest(vcpu, cpu, UD) if handled is None else handled
    if vector in (1, 3) and vcpu.guest_debug:
        return debug_exit(vcpu, cpu, vector, 0)
    cpu.inject(information, cpu.exit.interruption_error, cpu.exit.instruction_length)
    return True


def _unexpected(vcpu: "Vcpu", reason: int) -> bool:
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_INTERNAL_ERROR
    run.u32[UNION_U32] = KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    run.u32[UNION_U32 + 1] = 2
    run.u64[UNION_U64 + 1] = reason
    run.u64[UNION_U64 + 2] = vcpu.lp
    return False


def _io(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return emulate_port_io(vcpu, cpu)


def _vmcall(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    handled = hypercall_instruction(vcpu, cpu)
    return raise_in_guest(vcpu, cpu, UD) if handled is None else handled


def _rdmsr(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return emulate_rdmsr(vcpu, cpu)


def _wrmsr(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return emulate_wrmsr(vcpu, cpu)


def _cr_access(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return emulate_control_register(vcpu, cpu)


def _xsetbv(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return emulate_xsetbv(vcpu, cpu)


def _rdpmc(_ops: "DefaultVmOps", vcpu: "Vcpu", cpu: Cpu) -> bool:
    return raise_in_guest(vcpu, cpu, GP)


_R = ExitReason
_EXITS: Final = MappingProxyType[int, ExitHandler](
    {
        _R.EXCEPTION_OR_NMI: _exception,
        _R.EXTERNAL_INTERRUPT: _continue,
        _R.TRIPLE_FAULT: _triple_fault,
        _R.OTHER_SMI: _continue,
        _R.INTERRUPT_WINDOW: _window,
        _R.CPUID: _cpuid,
        _R.HLT: _hlt,
        _R.INVD: _skip,
        _R.WBINVD: _skip,
        _R.PAUSE: _skip,
        _R.RDPMC: _rdpmc,
        _R.VMCALL: _vmcall,
        _R.CR_ACCESS: _cr_access,
        _R.IO_INSTRUCTION: _io,
        _R.MSR_READ: _rdmsr,
        _R.MSR_WRITE: _wrmsr,
        _R.MONITOR: _undefined,
        _R.MWAIT: _undefined,
        _R.EPT_VIOLATION: _ept_violation,
        _R.XSETBV: _xsetbv,
        # Nested virtualization, SGX, SMX and TDX instructions do not exist for this guest.
        _R.GETSEC: _undefined,
        _R.VMCLEAR: _undefined,
        _R.VMLAUNCH: _undefined,
        _R.VMPTRLD: _undefined,
        _R.VMPTRST: _undefined,
        _R.VMREAD: _undefined,
        _R.VMRESUME: _undefined,
        _R.VMWRITE: _undefined,
        _R.VMXOFF: _undefined,
        _R.VMXON: _undefined,
        _R.INVEPT: _undefined,
        _R.INVVPID: _undefined,
        _R.VMFUNC: _undefined,
        _R.ENCLS: _undefined,
        _R.ENCLV: _undefined,
        _R.SEAMCALL: _undefined,
        _R.TDCALL: _undefined,
    }
)

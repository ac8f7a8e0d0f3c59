"""The state of an unprotected vCPU after RESET, INIT and SIPI (`kvm_vcpu_reset`)."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import CpuState, Segment
from sim_backend.hw.gprs import RDX
from sim_backend.kvm.msrs import CLEARED_BY_INIT

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_CR0_RESET: Final = 0x6000_0010
_RESET_RIP: Final = 0xFFF0
_RFLAGS_RESET: Final = 2
_DEFAULT_SIGNATURE: Final = 0x600  # RDX where the CPUID table has no leaf 1
_PRESENT_CODE_DATA: Final = 0x90
_PRESENT_SYSTEM: Final = 0x80
_XFEATURES_RESET: Final = 1


def reset_state(vcpu: "Vcpu") -> CpuState:
    """Return the architectural state at the reset vector."""
    kinds = vcpu.vm.host.profile.segment_reset_types
    data = _PRESENT_CODE_DATA | kinds["data"]
    state = CpuState(cr0=_CR0_RESET, xcr0=_XFEATURES_RESET)
    state.cs = Segment(selector=0xF000, base=0xFFFF_0000, limit=0xFFFF, ar=_PRESENT_CODE_DATA | kinds["cs"])
    for name in ("ds", "es", "fs", "gs"):
        setattr(state, name, Segment(limit=0xFFFF, ar=data))
    state.ss = Segment(limit=0xFFFF, ar=_PRESENT_CODE_DATA | kinds["ss"])
    state.tr = Segment(limit=0xFFFF, ar=_PRESENT_SYSTEM | kinds["tr"])
    state.ldtr = Segment(limit=0xFFFF, ar=_PRESENT_SYSTEM | kinds["ldtr"])
    return state


def reset_vcpu(vcpu: "Vcpu", *, init_event: bool) -> None:
    """Reset the vCPU's registers; INIT keeps MSRs, CR0.CD and CR0.NW, the FPU and the APIC base."""
    cpu = vcpu.cpu
    if cpu is None:
        return
    state = reset_state(vcpu)
    if init_event:
        old = cpu.get_state()
        state.cr0 = _CR0_RESET & 0x10 | old.cr0 & 0x6000_0000
        state.msrs, state.fxsave, state.xcr0 = old.msrs, old.fxsave, old.xcr0
    cpu.set_state(state)
    cpu.gprs[:] = [0] * 16
    signature = vcpu.cpuid.find(1)
    cpu.gprs[RDX] = signature.eax if signature is not None else _DEFAULT_SIGNATURE
    cpu.rip = _RESET_RIP
    cpu.rflags = _RFLAGS_RESET
    vcpu.saved_state = vcpu.set_pdptrs = None  # what user space had set counts no more
    vcpu.set_rflags = -1
    vcpu.exception.pending = vcpu.exception.injected = False
    if vcpu.interrupt >= 0:
        vcpu.interrupt_nr, vcpu.interrupt = vcpu.interrupt, -1
    vcpu.interrupt_shadow = 0
    vcpu.nmi_queued = vcpu.nmi_pending = 0
    vcpu.nmi_injected = vcpu.nmi_masked = False
    vcpu.smi_pending = False
    vcpu.guest_breakpoints = False
    vcpu.svm_gif = True
    vcpu.complete_userspace_io = None
    if init_event:
        for index in CLEARED_BY_INIT:
            vcpu.msrs.pop(index, None)
    if vcpu.apic is not None:
        vcpu.apic.reset(init_event=init_event)


def start_at_sipi_vector(vcpu: "Vcpu", vector: int) -> None:
    """Start in real mode at page `vector` (kvm_vcpu_deliver_sipi_vector)."""
    cpu = vcpu.cpu
    if cpu is None:
        return
    state = vcpu.read_state()
    state.cs.selector, state.cs.base = vector << 8, vector << 12
    vcpu.write_state(state)
    cpu.rip = 0

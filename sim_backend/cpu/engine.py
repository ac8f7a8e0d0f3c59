"""What the layers above may ask of a CPU: run a guest until it exits, as VMX would.

The vocabulary is VMX's, because both users speak it: KVM's ordinary VMs and the TDX module. An engine
decides how the instructions run; it must end in a clear stop, never in a wrong result.
"""

from dataclasses import dataclass, field
from typing import Protocol

from sim_backend.cpu.virtual_apic import VirtualApic
from sim_backend.hw.gprs import Gprs
from uapi_ctypes.vmx import ExitReason as ExitReason  # part of this vocabulary


@dataclass(slots=True)
class VmExit:
    """The VM-exit information fields of the VMCS. One instance per CPU, rewritten at every exit."""

    reason: int = 0
    qualification: int = 0
    gpa: int = 0  # guest-physical address [bytes], EPT exits only
    gla: int = 0  # guest-linear address [bytes]
    interruption_info: int = 0
    interruption_error: int = 0
    instruction_length: int = 0  # [bytes]
    instruction_info: int = 0
    vectoring_info: int = 0  # of the event in whose delivery an EPT violation came; whoever handles that clears it
    vectoring_error: int = 0


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part; `ar` in VMX access-rights format (bit 16: unusable)."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    ar: int = 0x10000


@dataclass(slots=True)
class CpuState:
    """Everything architectural but the GPRs, RIP and RFLAGS, which `Cpu` keeps at hand."""

    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    xcr0: int = 1
    dr: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0xFFFF0FF0, 0x400])  # DR0-3, DR6, DR7
    es: Segment = field(default_factory=Segment)
    cs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ldtr: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    gdtr_base: int = 0
    gdtr_limit: int = 0xFFFF
    idtr_base: int = 0
    idtr_limit: int = 0xFFFF
    msrs: dict[int, int] = field(default_factory=dict)  # MSRs that the guest reads and writes natively
    fxsave: bytes = b""  # 512-byte FXSAVE image, or empty for the reset state


class SecondLevel(Protocol):
    """EPT as the CPU sees it: guest-physical to host-physical, 4 KiB at a time."""

    def walk(self, gpa: int) -> int:
        """Return the leaf entry for the 4 KiB page of `gpa` in EPT format.

        Bits 2:0 are R, W, X; bits 51:12 the HPA of the 4 KiB page; bit 63 is suppress-#VE. An entry
        with bits 2:0 clear is not present and leads to an EPT violation (or a #VE, see below).
        """
        ...

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        """Store EPT-violation #VE information; False when the area is busy or #VE is not enabled.

        Asked only for a violation on an entry whose suppress-#VE bit is clear. On True the CPU
        delivers exception 20, on False it exits with EPT_VIOLATION.
        """
        ...


class MsrPolicy(Protocol):
    """The MSR bitmap."""

    def exits(self, msr: int, write: bool) -> bool:
        """Tell whether this access leaves the guest (otherwise it acts on `CpuState.msrs`)."""
        ...


class Cpu(Protocol):
    """The hardware context of one virtual CPU.

    `gprs`, `rip` and `rflags` are valid whenever the guest is not running, and what is stored there
    takes effect at the next `run`. CPUID, HLT, I/O, INVD, WBINVD, MONITOR, MWAIT, RDPMC, XSETBV, VMX
    and SEAM instructions, CR0/CR4/CR8 writes, and MSR
    accesses that the policy says, always exit with RIP *at* the
    instruction and `instruction_length` set; the handler advances RIP. With a `virtual_apic`, CR8 is its TPR and
    does not exit, nor does the interrupt window, and the x2APIC MSRs that the policy leaves to the CPU are its own.
    """

    gprs: Gprs
    rip: int
    rflags: int
    exit: VmExit
    second_level: SecondLevel
    msr_policy: MsrPolicy
    exception_bitmap: int  # guest exceptions (bit = vector) that exit instead of being delivered
    steps: bool  # RFLAGS.TF is the host's, for one step: no event saves it or clears it
    virtual_apic: VirtualApic | None  # None: no APIC virtualization

    def get_state(self) -> CpuState:
        """Return a copy of the rest of the architectural state."""
        ...

    def set_state(self, state: CpuState) -> None:
        """Replace the rest of the architectural state."""
        ...

    def in_64bit_mode(self) -> bool:
        """Tell whether EFER.LMA and CS.L are both set."""
        ...

    def cpl(self) -> int:
        """Return the current privilege level, 0 to 3."""
        ...

    def inject(self, interruption_info: int, error_code: int = 0, instruction_length: int = 0) -> None:
        """Deliver an event at the next `run` (VM-entry interruption-information format)."""
        ...

    def take_back(self) -> tuple[int, int, int]:
        """Return and forget what `inject` left and no run has delivered: its arguments, or zeros."""
        ...

    def can_take_interrupt(self) -> bool:
        """Tell whether an external interrupt could be injected now (IF set, no STI/MOV SS shadow)."""
        ...

    def request_interrupt_window(self, wanted: bool) -> None:
        """Ask for an INTERRUPT_WINDOW exit as soon as `can_take_interrupt` holds."""
        ...

    def run(self) -> VmExit:
        """Run the guest until it exits. After `kick` the exit is EXTERNAL_INTERRUPT."""
        ...

    def kick(self) -> None:
        """Make the current or the next `run` end soon. May be called from any thread."""
        ...

    def external_interrupt(self, vector: int) -> None:
        """Make an external interrupt arrive: the notification vector of `virtual_apic` is processed, others `kick`.

        May be called from any thread.
        """
        ...

    def invalidate(self) -> None:
        """Forget every cached second-level translation (INVEPT). Not while the guest runs."""
        ...

    def invalidate_code(self, hpa: int, length: int) -> None:
        """Forget code translated from these host pages: somebody else wrote there."""
        ...

    def read_linear(self, gla: int, length: int) -> bytes:
        """Read guest memory through both levels of paging, for diagnostics; raise ``LookupError``."""
        ...

    def close(self) -> None:
        """Give the context back."""
        ...


class CpuFactory(Protocol):
    """Makes CPU contexts: the one thing a host asks of an engine."""

    def new_cpu(self) -> Cpu:
        """Return a context in the architectural reset state."""
        ...

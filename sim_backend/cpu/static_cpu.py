"""A CPU that runs nothing: it only holds the state of one, for replay and for tests of the models above it."""

from copy import deepcopy

from sim_backend.cpu.engine import CpuState, MsrPolicy, SecondLevel, VmExit
from sim_backend.cpu.virtual_apic import VirtualApic
from sim_backend.hw.gprs import new_gprs

_EFER_LMA = 1 << 10
_CS_L = 1 << 13


class StaticCpu:
    """Implements `Cpu` without an engine. `injected` keeps the last event until the next `resume`."""

    __slots__ = (
        "code_invalidations",
        "exception_bitmap",
        "exit",
        "gprs",
        "injected",
        "injected_error",
        "interrupt_window",
        "invalidations",
        "kicked",
        "msr_policy",
        "nmi_window",
        "rflags",
        "rip",
        "second_level",
        "state",
        "steps",
        "virtual_apic",
    )

    second_level: SecondLevel
    msr_policy: MsrPolicy

    def __init__(self) -> None:
        self.gprs = new_gprs()
        self.rip = 0xFFF0
        self.exception_bitmap = 0
        self.steps = False
        self.virtual_apic: VirtualApic | None = None
        self.rflags = 2
        self.exit = VmExit()
        self.state = CpuState()
        self.injected = 0  # VM-entry interruption information
        self.injected_error = 0
        self.interrupt_window = False
        self.nmi_window = False
        self.kicked = False
        self.invalidations = 0
        self.code_invalidations = 0

    def get_state(self) -> CpuState:
        """Return a copy of the state."""
        return deepcopy(self.state)

    def set_state(self, state: CpuState) -> None:
        """Replace the state."""
        self.state = deepcopy(state)

    def in_64bit_mode(self) -> bool:
        """Tell whether EFER.LMA and CS.L are both set."""
        return bool(self.state.efer & _EFER_LMA and self.state.cs.ar & _CS_L)

    def cpl(self) -> int:
        """Return the DPL of SS, which VMX keeps equal to the CPL."""
        return self.state.ss.ar >> 5 & 3

    def inject(self, interruption_info: int, error_code: int = 0, instruction_length: int = 0) -> None:  # noqa: ARG002
        """Note the event for whoever asks."""
        self.injected = interruption_info
        self.injected_error = error_code

    def take_back(self) -> tuple[int, int, int]:
        """Return and forget the event."""
        return self.take_injected(), self.injected_error, 0

    def take_injected(self) -> int:
        """Return the event noted since the last call, or zero."""
        injected, self.injected = self.injected, 0
        return injected

    def can_take_interrupt(self) -> bool:
        """Tell whether RFLAGS.IF is set."""
        return bool(self.rflags & 0x200)

    def request_interrupt_window(self, wanted: bool) -> None:
        """Note the wish."""
        self.interrupt_window = wanted

    def request_nmi_window(self, wanted: bool) -> None:
        """Note the wish."""
        self.nmi_window = wanted

    def run(self) -> VmExit:
        """Refuse: there is no engine behind this CPU."""
        raise RuntimeError("a StaticCpu cannot run a guest")

    def kick(self) -> None:
        """Note the kick."""
        self.kicked = True

    def external_interrupt(self, vector: int) -> None:
        """Notify the virtual APIC, or note a kick."""
        apic = self.virtual_apic
        if apic is not None and apic.notification_vector == vector:
            apic.notify()
        else:
            self.kicked = True

    def invalidate(self) -> None:
        """Count the invalidation."""
        self.invalidations += 1

    def invalidate_code(self, hpa: int, length: int) -> None:  # noqa: ARG002
        """Count the invalidation."""
        self.code_invalidations += 1

    def read_linear(self, gla: int, length: int) -> bytes:
        """Refuse: nothing is mapped."""
        raise LookupError(f"no mapping at GLA {gla:#x} for {length} bytes")

    def close(self) -> None:
        """Nothing to give back."""


class StaticCpus:
    """The factory of CPUs that run nothing."""

    def new_cpu(self) -> StaticCpu:
        """Return a CPU in its reset state."""
        return StaticCpu()

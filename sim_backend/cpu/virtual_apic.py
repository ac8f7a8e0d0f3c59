"""The virtual APIC that VMX keeps for a guest: registers in a page, posted interrupts, virtual-interrupt delivery.

The controls are those of a TD: "use TPR shadow", "virtualize x2APIC mode", "APIC-register virtualization" and
"virtual-interrupt delivery" are on, "interrupt-window exiting" and every EOI-exit bit are off.

::

    PIR --notification--> VIRR --RVI above VPPR, IF, no shadow--> VISR (the handler runs) --EOI--> nothing
                           ^
    SELF_IPI --------------+

Source: Intel SDM Vol. 3, "APIC Virtualization and Virtual Interrupts". Section names in the docstrings are its own.
"""

from typing import Final

from sim_backend.cpu.errors import EngineError
from sim_backend.hw.memory import PhysicalMemory

NO_DESCRIPTOR: Final = -1
NO_VECTOR: Final = -1

IA32_X2APIC_TPR: Final = 0x808
IA32_X2APIC_PPR: Final = 0x80A
IA32_X2APIC_EOI: Final = 0x80B
IA32_X2APIC_ISR0: Final = 0x810
IA32_X2APIC_TMR0: Final = 0x818
IA32_X2APIC_IRR0: Final = 0x820
IA32_X2APIC_SELF_IPI: Final = 0x83F
X2APIC_MSRS: Final = range(0x800, 0x900)

# u64 indexes into the virtual-APIC page: a register of 32 bits every 16 bytes.
_VTPR: Final = 0x80 >> 3
_VPPR: Final = 0xA0 >> 3
_VEOI: Final = 0xB0 >> 3
_VISR: Final = 0x100 >> 3
_VIRR: Final = 0x200 >> 3
_VSELF_IPI: Final = 0x3F0 >> 3
_WORDS_256: Final = range(0, 16, 2)  # the eight registers of VISR or VIRR
_SELF_IPI_OFFSET: Final = 0x3F0

# The posted-interrupt descriptor, in u64s.
_PIR: Final = range(4)
_CONTROL: Final = 4
_ON: Final = 1
_DESCRIPTOR_WORDS: Final = 8

_CLASS: Final = 0xF0  # the priority class of a vector


class ApicWriteExit(Exception):  # noqa: N818 - the architecture's name
    """An APIC-write VM exit, after the WRMSR has completed; `offset` into the page is its qualification [bytes]."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"APIC-write VM exit at page offset {offset:#x}")
        self.offset = offset


class VirtualApic:
    """The virtual-APIC page at HPA `page`, RVI and SVI, and where interrupts are posted.

    `attention` is true while there is something to do before the guest's next instruction: it is all that a CPU
    looks at when nothing is pending. `notify` may be called from any thread, everything else by who runs the CPU.
    """

    __slots__ = (
        "_descriptor",
        "_memory",
        "_notified",
        "_page",
        "_q",
        "attention",
        "notification_vector",
        "rvi",
        "svi",
    )

    def __init__(self, memory: PhysicalMemory, page: int) -> None:
        self._memory: Final = memory
        self._q: Final = memory.q
        self._page: Final = page >> 3
        self._descriptor = NO_DESCRIPTOR
        self._notified = False
        self.attention = False
        self.notification_vector = NO_VECTOR
        self.rvi = 0
        self.svi = 0

    # ---- What the VMCS says ----

    def process_posted_interrupts(self, vector: int, descriptor: int) -> None:
        """Turn on "process posted interrupts": notification `vector`, `descriptor` HPA [bytes, 64-byte aligned]."""
        self._descriptor = descriptor >> 3
        self.notification_vector = vector

    def ignore_posted_interrupts(self) -> None:
        """Turn off "process posted interrupts"."""
        self._descriptor = NO_DESCRIPTOR
        self.notification_vector = NO_VECTOR
        self._notified = False

    @property
    def guest_interrupt_status(self) -> int:
        """The VMCS field: RVI in bits 7:0, SVI in bits 15:8."""
        return self.rvi | self.svi << 8

    @guest_interrupt_status.setter
    def guest_interrupt_status(self, value: int) -> None:
        self.rvi, self.svi = value & 0xFF, value >> 8 & 0xFF
        self.attention = True  # the next VM entry does PPR virtualization

    # ---- Arrival ----

    def notify(self) -> None:
        """Note that an interrupt with the notification vector arrived. Callable from any thread."""
        self._notified = True
        self.attention = True

    def _take_posted(self) -> None:
        """Move PIR to VIRR ("Posted-Interrupt Processing", after the interrupt was acknowledged)."""
        base, q = self._descriptor, self._q
        if base < 0:
            return
        if base + _DESCRIPTOR_WORDS > len(q):
            raise EngineError(f"the posted-interrupt descriptor at HPA {base << 3:#x} is not in RAM: not modelled")
        irr = self._page + _VIRR
        highest = 0
        with self._memory.locked_instruction:
            q[base + _CONTROL] &= ~_ON
            for word in _PIR:
                requests = q[base + word]
                if requests:
                    q[base + word] = 0
                    q[irr + 4 * word] |= requests & 0xFFFF_FFFF
                    q[irr + 4 * word + 2] |= requests >> 32
                    highest = 64 * word + requests.bit_length() - 1
        self.rvi = max(self.rvi, highest)

    # ---- Recognition and delivery ----

    def recognized(self) -> int:
        """Look what is pending; return the vector to deliver when the guest takes interrupts, or NO_VECTOR.

        Source: "Evaluation of Pending Virtual Interrupts".
        """
        self.attention = False  # first: a notification that comes from here on sets it again
        if self._notified:
            self._notified = False
            self._take_posted()
        self._update_vppr()
        rvi = self.rvi
        if rvi & _CLASS > self._q[self._page + _VPPR] & _CLASS:
            self.attention = True
            return rvi
        return NO_VECTOR

    def acknowledge(self) -> None:
        """Move the recognized interrupt from VIRR to VISR: it is being delivered ("Virtual-Interrupt Delivery")."""
        q, page, vector = self._q, self._page, self.rvi
        word, bit = 2 * (vector >> 5), 1 << (vector & 31)
        q[page + _VISR + word] |= bit
        self.svi = vector
        q[page + _VPPR] = vector & _CLASS
        q[page + _VIRR + word] &= ~bit
        self.rvi = self._highest(_VIRR)
        self.attention = True  # the next one is evaluated before the handler's first instruction

    def _highest(self, register: int) -> int:
        """Return the highest vector set in VISR or VIRR, zero when there is none."""
        q, first = self._q, self._page + register
        for word in reversed(_WORDS_256):
            bits = q[first + word] & 0xFFFF_FFFF
            if bits:
                return 16 * word + bits.bit_length() - 1
        return 0

    def _update_vppr(self) -> None:
        """PPR virtualization."""
        q, page, svi = self._q, self._page, self.svi
        tpr = q[page + _VTPR] & 0xFF
        q[page + _VPPR] = tpr if tpr & _CLASS >= svi & _CLASS else svi & _CLASS

    # ---- What the guest does ----

    @property
    def tpr(self) -> int:
        """VTPR; CR8 is its bits 7:4."""
        return self._q[self._page + _VTPR] & 0xFF

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._q[self._page + _VTPR] = value
        self._update_vppr()
        self.attention = True

    def _eoi(self) -> None:
        """EOI virtualization."""
        q, page, vector = self._q, self._page, self.svi
        q[page + _VEOI] = 0
        q[page + _VISR + 2 * (vector >> 5)] &= ~(1 << (vector & 31))
        self.svi = self._highest(_VISR)
        self._update_vppr()
        self.attention = True

    def _self_ipi(self, vector: int) -> None:
        """Self-IPI virtualization."""
        q, page = self._q, self._page
        q[page + _VSELF_IPI] = vector
        q[page + _VIRR + 2 * (vector >> 5)] |= 1 << (vector & 31)
        self.rvi = max(self.rvi, vector)
        self.attention = True

    def read_msr(self, msr: int) -> int:
        """RDMSR of an x2APIC MSR: what is on the page, whether such a register exists or not.

        Source: "Virtualizing MSR-Based APIC Accesses".
        """
        return self._q[self._page + 2 * (msr & 0xFF)]

    def write_msr(self, msr: int, value: int) -> None:
        """WRMSR of an x2APIC MSR.

        Raise ``ValueError`` for reserved bits and ``KeyError`` for a register that cannot be written, both #GP(0);
        `ApicWriteExit` for a SELF_IPI with a vector below 16. Source: "Virtualizing MSR-Based APIC Accesses".
        """
        if msr == IA32_X2APIC_EOI:
            if value:
                raise ValueError(f"EOI {value:#x} is not zero")
            self._eoi()
        elif msr == IA32_X2APIC_TPR:
            if value >> 8:
                raise ValueError(f"TPR {value:#x} has reserved bits")
            self.tpr = value
        elif msr == IA32_X2APIC_SELF_IPI:
            if value >> 8:
                raise ValueError(f"SELF_IPI {value:#x} has reserved bits")
            if not value & _CLASS:
                self._q[self._page + _VSELF_IPI] = value
                raise ApicWriteExit(_SELF_IPI_OFFSET)
            self._self_ipi(value)
        else:
            raise KeyError(msr)

"""The in-kernel local APIC of one vCPU (`arch/x86/kvm/lapic.c`).

IRR, ISR and TMR are 256-bit integers; every other register is a 32-bit word by its xAPIC page offset divided by 16,
which is also its x2APIC MSR number less 0x800.
"""

import struct
import threading
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.apic_timer import ApicTimer

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

# Register numbers: xAPIC offset >> 4.
ID: Final = 0x02
LVR: Final = 0x03
TASKPRI: Final = 0x08
ARBPRI: Final = 0x09
PROCPRI: Final = 0x0A
EOI: Final = 0x0B
RRR: Final = 0x0C
LDR: Final = 0x0D
DFR: Final = 0x0E
SPIV: Final = 0x0F
ISR: Final = 0x10
TMR: Final = 0x18
IRR: Final = 0x20
ESR: Final = 0x28
LVTCMCI: Final = 0x2F
ICR: Final = 0x30
ICR2: Final = 0x31
LVTT: Final = 0x32
LVTTHMR: Final = 0x33
LVTPC: Final = 0x34
LVT0: Final = 0x35
LVT1: Final = 0x36
LVTERR: Final = 0x37
TMICT: Final = 0x38
TMCCT: Final = 0x39
TDCR: Final = 0x3E
SELF_IPI: Final = 0x3F

MODE_FIXED: Final = 0
MODE_LOWEST: Final = 1
MODE_SMI: Final = 2
MODE_REMRD: Final = 3
MODE_NMI: Final = 4
MODE_INIT: Final = 5
MODE_STARTUP: Final = 6
MODE_EXTINT: Final = 7

APIC_BASE_DEFAULT: Final = 0xFEE0_0000
APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_X2APIC: Final = 1 << 10
APIC_BASE_ENABLE: Final = 1 << 11

LVT_MASKED: Final = 1 << 16
SPIV_ENABLED: Final = 1 << 8
SPIV_DIRECTED_EOI: Final = 1 << 12
_VERSION: Final = 0x14
_LVT_WITHOUT_CMCI: Final = 6
_LVT_WRITABLE: Final = {
    LVTT: 0x0000_00FF | LVT_MASKED,
    LVTTHMR: 0x0000_07FF | LVT_MASKED,
    LVTPC: 0x0000_07FF | LVT_MASKED,
    LVT0: 0x0000_A7FF | LVT_MASKED,
    LVT1: 0x0000_A7FF | LVT_MASKED,
    LVTERR: 0x0000_00FF | LVT_MASKED,
    LVTCMCI: 0x0000_07FF | LVT_MASKED,
}
_READABLE: Final = frozenset(
    {ID, LVR, TASKPRI, PROCPRI, LDR, SPIV, ESR, ICR, TMICT, TMCCT, TDCR}
    | set(_LVT_WRITABLE)
    | set(range(ISR, ISR + 8))
    | set(range(TMR, TMR + 8))
    | set(range(IRR, IRR + 8))
)
_XAPIC_ONLY: Final = frozenset({ARBPRI, DFR, ICR2, RRR})
_U32: Final = 0xFFFF_FFFF
_XAPIC_BROADCAST: Final = 0xFF
_DFR_CLUSTER: Final = 0x0FFF_FFFF
_PAGE: Final = struct.Struct("<" + "I12x" * 64)


class LocalApic:
    """One local APIC. Registers belong to the vCPU's thread; IRR may be set from any thread."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self.vcpu: Final = vcpu
        self.base = vcpu.apic_base
        self.regs: Final = [0] * 64
        self.irr = 0
        self.isr = 0
        self.tmr = 0
        self.sipi_vector = 0
        self.init_pending = False
        self.sipi_pending = False
        self.timer: Final = ApicTimer(self)
        self._lock: Final = threading.Lock()
        self.nr_lvt = _LVT_WITHOUT_CMCI
        self.reset()

    # ---- modes ------------------------------------------------------------------------------------------

    @property
    def hw_enabled(self) -> bool:
        """Tell whether IA32_APIC_BASE enables it."""
        return bool(self.base & APIC_BASE_ENABLE)

    @property
    def sw_enabled(self) -> bool:
        """Tell whether SPIV bit 8 is set: without it fixed interrupts are dropped."""
        return bool(self.regs[SPIV] & SPIV_ENABLED)

    @property
    def x2apic(self) -> bool:
        """Tell whether it is in x2APIC mode."""
        return self.base & (APIC_BASE_X2APIC | APIC_BASE_ENABLE) == APIC_BASE_X2APIC | APIC_BASE_ENABLE

    @property
    def suppresses_eoi_broadcast(self) -> bool:
        """Tell whether the guest asked for no EOI broadcasts, and is heeded (`kvm_lapic_suppress_eoi_broadcast()`).

        Unless user space chose, an IOAPIC in the kernel heeds it, and user space's hears of every EOI.
        """
        if not self.regs[SPIV] & SPIV_DIRECTED_EOI:
            return False
        chosen = self.vcpu.vm.suppress_eoi_broadcast
        return chosen if chosen is not None else not self.vcpu.vm.has_split_irqchip()

    @property
    def xapic_id(self) -> int:
        """The 8-bit physical id of xAPIC mode, which the guest can change."""
        return self.regs[ID] >> 24

    @property
    def apic_id(self) -> int:
        """The 32-bit physical destination id."""
        return self.vcpu.id if self.x2apic else self.xapic_id

    def reset(self, *, init_event: bool = False) -> None:
        """Put every register into its reset state (kvm_lapic_reset); the base MSR is the caller's.

        INIT keeps the id, and in x2APIC mode the logical one that follows from it.
        """
        regs = self.regs
        own_id, logical_id = regs[ID], regs[LDR]
        regs[:] = [0] * 64
        regs[ID] = own_id if init_event else (self.vcpu.id & 0xFF) << 24
        if self.x2apic:
            regs[LDR] = logical_id
        for lvt in (LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR):
            regs[lvt] = LVT_MASKED
        if self.nr_lvt > _LVT_WITHOUT_CMCI:
            regs[LVTCMCI] = LVT_MASKED
        if self.vcpu.is_bsp and not self.vcpu.vm.disabled_quirks & 1:
            regs[LVT0] = MODE_EXTINT << 8  # KVM_X86_QUIRK_LINT0_REENABLED
        self.set_version()
        regs[DFR] = _U32
        regs[SPIV] = 0xFF
        self.irr = self.isr = self.tmr = 0
        self.timer.reset()
        self._recalculate_map()

    def set_version(self) -> None:
        """Fill the version register in: EOI broadcasts can be suppressed where the IOAPIC is user space's."""
        vm = self.vcpu.vm
        offered = vm.suppress_eoi_broadcast if vm.suppress_eoi_broadcast is not None else vm.has_split_irqchip()
        directed_eoi = self.vcpu.cpuid.has_x2apic and offered
        self.regs[LVR] = _VERSION | (self.nr_lvt - 1) << 16 | (1 << 24 if directed_eoi else 0)

    def set_cmci(self, offered: bool) -> None:
        """Have the LVT entry of corrected machine checks, masked, or not (kvm_apic_after_set_mcg_cap)."""
        if offered == (self.nr_lvt > _LVT_WITHOUT_CMCI):
            return
        if offered:
            self.regs[LVTCMCI] = LVT_MASKED
        self.nr_lvt = _LVT_WITHOUT_CMCI + offered
        self.set_version()

    def set_base(self, value: int) -> None:
        """Take a new, already checked IA32_APIC_BASE."""
        old, self.base = self.base, value
        if (old ^ value) & APIC_BASE_ENABLE and value & APIC_BASE_ENABLE:
            self.regs[ID] = (self.vcpu.id & 0xFF) << 24
        if (old ^ value) & APIC_BASE_X2APIC and value & APIC_BASE_X2APIC:
            vcpu_id = self.vcpu.id
            self.regs[ID] = vcpu_id
            self.regs[LDR] = (vcpu_id >> 4) << 16 | 1 << (vcpu_id & 0xF)
        elif (old ^ value) & APIC_BASE_X2APIC and value & APIC_BASE_ENABLE:
            self.regs[ID] = (self.vcpu.id & 0xFF) << 24
        if (old ^ value) & (APIC_BASE_ENABLE | APIC_BASE_X2APIC):
            self._recalculate_map()

    # ---- destinations -----------------------------------------------------------------------------------

    def matches_physical(self, destination: int) -> bool:
        """Tell whether a physical destination means this APIC, the broadcast of its mode included."""
        if self.x2apic:
            return destination in (_U32, self.vcpu.id)
        if destination > _XAPIC_BROADCAST:
            return destination == self.vcpu.id  # an id that xAPIC mode cannot express
        return destination in (_XAPIC_BROADCAST, self.xapic_id)

    def matches_logical(self, destination: int) -> bool:
        """Tell whether a logical destination includes this APIC."""
        if destination == (_U32 if self.x2apic else _XAPIC_BROADCAST):
            return True
        ldr = self.regs[LDR]
        if self.x2apic:
            return ldr >> 16 == destination >> 16 and bool(ldr & destination & 0xFFFF)
        logical = ldr >> 24
        if self.regs[DFR] == _U32:
            return bool(logical & destination & 0xFF)
        if self.regs[DFR] != _DFR_CLUSTER:
            return False
        return logical >> 4 == destination >> 4 and bool(logical & destination & 0xF)

    # ---- interrupts -------------------------------------------------------------------------------------

    def accept(self, mode: int, vector: int, *, level: bool, trigger_level: bool) -> int:
        """Take one interrupt message (any thread); return 1 when it was taken, 0 when it was dropped."""
        vcpu = self.vcpu
        if mode in (MODE_FIXED, MODE_LOWEST):
            if trigger_level and not level:
                return 0
            if not self.sw_enabled or not self.hw_enabled:
                return 0
            bit = 1 << vector
            with self._lock:
                if bool(self.tmr & bit) != trigger_level:
                    self.tmr ^= bit
            vcpu.vm.ops.deliver_interrupt(vcpu, vector)
            return 1
        if mode == MODE_SMI:
            return int(vcpu.queue_smi())
        if mode == MODE_NMI:
            vcpu.queue_nmi()
            return 1
        if mode == MODE_INIT:
            if trigger_level and not level:
                return 0
            self.init_pending, self.sipi_pending = True, False
            vcpu.kick()
            return 1
        if mode == MODE_STARTUP:
            self.sipi_vector = vector
            self.sipi_pending = True
            vcpu.kick()
            return 1
        if mode == MODE_REMRD:
            vcpu.unhalt_by_message()
            return 1
        return 0

    def set_irr(self, vector: int) -> None:
        """Make `vector` pending (any thread)."""
        with self._lock:
            self.irr |= 1 << vector

    def processor_priority(self) -> int:
        """Return PPR: the higher of TPR and the priority class in service."""
        tpr = self.regs[TASKPRI]
        in_service = max(self.isr.bit_length() - 1, 0)
        if tpr >> 4 >= in_service >> 4:
            return tpr & 0xFF
        return in_service & 0xF0

    def highest_pending(self) -> int:
        """Return the vector that could be delivered now, or -1."""
        if not self.irr:
            return -1
        vector = self.irr.bit_length() - 1
        return vector if vector >> 4 > self.processor_priority() >> 4 else -1

    def acknowledge(self) -> int:
        """Move the highest deliverable vector from IRR to ISR and return it, or -1."""
        vector = self.highest_pending()
        if vector >= 0:
            with self._lock:
                self.irr &= ~(1 << vector)
            self.isr |= 1 << vector
        return vector

    def end_of_interrupt(self) -> int:
        """EOI: clear the highest vector in service and return it, or -1 when none was."""
        if not self.isr:
            return -1
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None:
            irqchip.end_of_interrupt(self, vector)
        return vector

    def deliver_local(self, lvt: int) -> int:
        """Fire a local vector table entry (timer, LINT0, …); return 1 when it was taken."""
        entry = self.regs[lvt]
        if not self.hw_enabled or entry & LVT_MASKED:
            return 0
        return self.accept(
            entry >> 8 & 7, entry & 0xFF, level=True, trigger_level=lvt != LVTT and bool(entry >> 15 & 1)
        )

    def accepts_extint(self) -> bool:
        """Tell whether LVT0 lets the 8259 pair, or KVM_INTERRUPT with a split irqchip, through."""
        entry = self.regs[LVT0]
        return not self.hw_enabled or (not entry & LVT_MASKED and entry >> 8 & 7 == MODE_EXTINT)

    # ---- registers --------------------------------------------------------------------------------------

    def read(self, register: int) -> int | None:
        """Return a register by number, or None where there is none to read in the current mode."""
        if register == LVTCMCI and self.nr_lvt == _LVT_WITHOUT_CMCI:
            return None
        if register not in _READABLE and (self.x2apic or register not in _XAPIC_ONLY):
            return None
        if ISR <= register < ISR + 8:
            return self.isr >> ((register - ISR) * 32) & _U32
        if TMR <= register < TMR + 8:
            return self.tmr >> ((register - TMR) * 32) & _U32
        if IRR <= register < IRR + 8:
            return self.irr >> ((register - IRR) * 32) & _U32
        if register == PROCPRI:
            return self.processor_priority()
        if register == TMCCT:
            return self.timer.current_count()
        if register == ICR and self.x2apic:
            return self.regs[ICR] | self.regs[ICR2] << 32
        return self.regs[register]

    def write(self, register: int, value: int) -> bool:
        """Write a register by number; False where it cannot be written in the current mode."""
        regs = self.regs
        if register in _LVT_WRITABLE:
            if register == LVTCMCI and self.nr_lvt == _LVT_WITHOUT_CMCI:
                return False
            if not self.sw_enabled:
                value |= LVT_MASKED
            if register == LVTT:
                regs[LVTT] = value & (_LVT_WRITABLE[LVTT] | self.timer.mode_bits)
                self.timer.update_mode()
                self.timer.look_again()
            else:
                regs[register] = value & _LVT_WRITABLE[register]
        elif register == TASKPRI:
            regs[TASKPRI] = value & 0xFF
        elif register == EOI:
            self.end_of_interrupt()
        elif register == SPIV:
            mask = 0x3FF | (SPIV_DIRECTED_EOI if regs[LVR] >> 24 & 1 else 0)
            self._set_spiv(value & mask)
            if not value & SPIV_ENABLED:
                for lvt in (LVTT, LVTTHMR, LVTPC, LVT0, LVT1, LVTERR):
                    regs[lvt] |= LVT_MASKED
                if self.nr_lvt > _LVT_WITHOUT_CMCI:
                    regs[LVTCMCI] |= LVT_MASKED
                self.timer.update_mode()
                self.timer.forget_pending()
        elif register == ICR:
            regs[ICR] = value & ~(1 << 12) & _U32
            self._send_ipi(regs[ICR], regs[ICR2])
        elif register == TMICT:
            self.timer.write_initial_count(value)
        elif register == TDCR:
            regs[TDCR] = value & 0xB
            self.timer.write_divide()
        elif register == ESR:
            if self.x2apic and value:
                return False
        elif register == SELF_IPI:
            if not self.x2apic or value & ~0xFF:
                return False
            self.accept(MODE_FIXED, value, level=True, trigger_level=False)
        elif self.x2apic:
            return False
        elif register in (ID, LDR, DFR):
            regs[register] = value | _DFR_CLUSTER if register == DFR else value & 0xFF00_0000
            self._recalculate_map()
        elif register == ICR2:
            regs[ICR2] = value & 0xFF00_0000
        else:
            return False
        return True

    def write_x2apic_icr(self, value: int) -> bool:
        """Write the 64-bit ICR of x2APIC mode; False for reserved bits."""
        if value & ~(0xFFFF_FFFF << 32 | 0xCDFFF):
            return False
        self.regs[ICR2] = value >> 32
        self.regs[ICR] = value & ~(1 << 12) & _U32
        self._send_ipi(self.regs[ICR], self.regs[ICR2])
        return True

    def _set_spiv(self, value: int) -> None:
        was_enabled, self.regs[SPIV] = self.sw_enabled, value
        if was_enabled != self.sw_enabled:
            self._recalculate_map()

    def _recalculate_map(self) -> None:
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None:
            irqchip.recalculate_apic_map()

    def _send_ipi(self, low: int, high: int) -> None:
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None:
            irqchip.send_ipi(self, low, high if self.x2apic else high >> 24)

    # ---- KVM_GET_LAPIC, KVM_SET_LAPIC -------------------------------------------------------------------

    def page(self) -> bytes:
        """Return the 1024-byte register page as KVM_GET_LAPIC shows it."""
        words = list(self.regs)
        for base, value in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            for index in range(8):
                words[base + index] = value >> (32 * index) & _U32
        words[TMCCT] = self.timer.current_count()
        words[PROCPRI] = self.processor_priority()
        if self.x2apic:
            words[ID] = self.vcpu.id if self.vcpu.vm.x2apic_32bit_ids else (self.vcpu.id & 0xFF) << 24
        return _PAGE.pack(*words)

    def set_page(self, page: bytes) -> bool:
        """Take a register page from KVM_SET_LAPIC; False when it is impossible (an x2APIC id that differs)."""
        words = _PAGE.unpack(page)
        if self.x2apic:
            given = words[ID] if self.vcpu.vm.x2apic_32bit_ids else words[ID] >> 24
            if given != (self.vcpu.id if self.vcpu.vm.x2apic_32bit_ids else self.vcpu.id & 0xFF):
                self._set_spiv(words[SPIV])  # kvm_apic_set_state() takes it before it looks at the rest
                return False
        version = self.regs[LVR]
        self.regs[:] = words
        self.regs[LVR] = version
        if self.x2apic:
            self.regs[ID] = self.vcpu.id
            self.regs[LDR] = (self.vcpu.id >> 4) << 16 | 1 << (self.vcpu.id & 0xF)
        for name, base in (("isr", ISR), ("tmr", TMR), ("irr", IRR)):
            setattr(self, name, sum(words[base + index] << (32 * index) for index in range(8)))
        self._recalculate_map()
        self.timer.restore(words[TMCCT])
        self.regs[TMCCT] = 0
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None and irqchip.ioapic is not None:
            with irqchip.lock:
                irqchip.ioapic.restore_rtc(self.vcpu)
        return True

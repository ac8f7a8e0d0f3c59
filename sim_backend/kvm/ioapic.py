"""The IOAPIC of a full irqchip (`arch/x86/kvm/ioapic.c`)."""

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.irqchip import Irqchip
    from sim_backend.kvm.vcpu import Vcpu

IOAPIC_DEFAULT_BASE: Final = 0xFEC0_0000
PINS: Final = 24
IOAPIC_STATE: Final = struct.Struct("<QIIII24Q")  # struct kvm_ioapic_state
_MASKED: Final = 1 << 16
_LEVEL: Final = 1 << 15
_REMOTE_IRR: Final = 1 << 14
_DELIVERY_STATUS: Final = 1 << 12
_RTC_PIN: Final = 8
_IOAPIC: Final = 2  # its number among the chips of a GSI route
_WINDOW_BYTES: Final = 0x100


class Ioapic:
    """24 pins, each with a 64-bit redirection entry."""

    def __init__(self, irqchip: "Irqchip") -> None:
        self._irqchip: Final = irqchip
        self.base = IOAPIC_DEFAULT_BASE
        self.ioregsel = 0
        self.id = 0
        self.irr = 0  # pins that are high and, of edge-triggered ones, were delivered or not
        self._delivered = 0  # edge-triggered pins of `irr` whose edge went out
        self.entries = [_MASKED] * PINS
        self._levels: Final = [0] * PINS
        self._rtc: Final[dict[int, int]] = {}  # vCPU id -> vector of the RTC's interrupt that it did not end yet

    def set_irq(self, pin: int, source: int, level: bool, *, line_status: bool = False) -> int:
        """Change a pin on behalf of `source`; return as kvm_ioapic_set_irq() does.

        With `line_status` user space hears of the RTC's ticks that the guest missed.
        """
        levels = self._levels
        levels[pin] = levels[pin] | 1 << source if level else levels[pin] & ~(1 << source)
        mask = 1 << pin
        if not levels[pin]:
            self.irr &= ~mask
            return 1
        return self._raise(pin, line_status=line_status)

    def _raise(self, pin: int, *, line_status: bool) -> int:
        if pin == _RTC_PIN and line_status and self._rtc:
            return 0
        mask = 1 << pin
        was_high = self.irr & mask
        self.irr |= mask
        if not self.entries[pin] & _LEVEL:
            self._delivered &= ~mask
            if was_high:
                return 0
        return self._service(pin, line_status=line_status)

    def _service(self, pin: int, *, line_status: bool = False) -> int:
        entry = self.entries[pin]
        if entry & _MASKED:
            return -1
        level = bool(entry & _LEVEL)
        if level and entry & _REMOTE_IRR:
            return -1
        if not level:
            self._delivered |= 1 << pin
        track = pin == _RTC_PIN and line_status
        taken_by: list[int] = []
        taken = self._irqchip.deliver(
            entry >> 56 & 0xFF,
            logical=bool(entry >> 11 & 1),
            mode=entry >> 8 & 7,
            vector=entry & 0xFF,
            trigger_level=level,
            taken_by=taken_by if track else None,
        )
        if track:
            self._rtc.update(dict.fromkeys(taken_by, entry & 0xFF))
        if taken and level:
            self.entries[pin] |= _REMOTE_IRR
        return taken

    def handles(self, vcpu: "Vcpu", vector: int) -> bool:
        """Tell whether an EOI of `vector` on `vcpu` reaches this chip (`kvm_ioapic_scan_entry()`)."""
        if self._rtc.get(vcpu.id) == vector:
            return True
        for pin, entry in enumerate(self.entries):
            if entry & 0xFF == vector and (
                entry & _LEVEL or pin == _RTC_PIN or self._irqchip.wants_acknowledgement(_IOAPIC, pin)
            ):
                return True
        return False

    def end_of_interrupt(self, vcpu: "Vcpu", vector: int, *, by_level: bool) -> None:
        """Take an EOI (`kvm_ioapic_update_eoi()`): pins whose interrupt came `by_level` may fire again."""
        if self._rtc.get(vcpu.id) == vector:
            del self._rtc[vcpu.id]
        for pin in range(PINS):
            if self.entries[pin] & 0xFF != vector:
                continue
            self._irqchip.acknowledged(_IOAPIC, pin)  # a resampled line goes down before it is looked at
            if by_level:
                self.entries[pin] &= ~_REMOTE_IRR
                if self.irr >> pin & 1:
                    self._service(pin)

    # ---- registers --------------------------------------------------------------------------------------

    def holds(self, address: int) -> bool:
        """Tell whether the guest-physical `address` is in the register window."""
        return self.base <= address < self.base + _WINDOW_BYTES

    def read(self, address: int) -> int:
        """Read a 32-bit register."""
        offset = address - self.base & 0xFF
        if offset == 0:
            return self.ioregsel
        if offset != 0x10:
            return 0
        select = self.ioregsel
        if select == 1:
            return PINS - 1 << 16 | 0x11
        if select in (0, 2):
            return (self.id & 0xF) << 24
        index = select - 0x10 >> 1
        if 0 <= index < PINS:
            return self.entries[index] >> (32 * (select & 1)) & 0xFFFF_FFFF
        return 0xFFFF_FFFF

    def write(self, address: int, value: int) -> None:
        """Write a 32-bit register."""
        offset = address - self.base & 0xFF
        if offset == 0:
            self.ioregsel = value & 0xFF
        elif offset == 0x10:
            self._write_selected(value)

    def _write_selected(self, value: int) -> None:
        select = self.ioregsel
        if select == 0:
            self.id = value >> 24 & 0xF
            return
        index = select - 0x10 >> 1
        if not 0 <= index < PINS:
            return
        entry = self.entries[index]
        if select & 1:
            entry = entry & 0xFFFF_FFFF | value << 32
        else:
            keep = entry & (_REMOTE_IRR | _DELIVERY_STATUS)
            entry = entry & ~0xFFFF_FFFF | value & ~(_REMOTE_IRR | _DELIVERY_STATUS) & 0xFFFF_FFFF | keep
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        self.entries[index] = entry
        if entry & _LEVEL and self.irr >> index & 1 and not entry & (_MASKED | _REMOTE_IRR):
            # The line may be low again since: whoever can be asked is, and raises it once more if it is not.
            if self._irqchip.resample(_IOAPIC, index):
                self.irr &= ~(1 << index)
            else:
                self._service(index)

    # ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP ---------------------------------------------------------------

    def state(self) -> bytes:
        """Return ``struct kvm_ioapic_state``."""
        return IOAPIC_STATE.pack(self.base, self.ioregsel, self.id, self.irr & ~self._delivered, 0, *self.entries)

    def set_state(self, data: bytes) -> None:
        """Take ``struct kvm_ioapic_state``; pins that it says are raised fire."""
        self.base, self.ioregsel, self.id, irr, _pad, *entries = IOAPIC_STATE.unpack(data[: IOAPIC_STATE.size])
        self.entries = list(entries)
        self.irr = self._delivered = 0
        self._rtc.clear()
        for pin in range(PINS):
            if irr >> pin & 1:
                self._raise(pin, line_status=True)
        for vcpu in self._irqchip.vm.vcpus:
            self.restore_rtc(vcpu)

    def restore_rtc(self, vcpu: "Vcpu") -> None:
        """Find out whether `vcpu` has an interrupt of the RTC to end (`kvm_rtc_eoi_tracking_restore_one()`)."""
        entry = self.entries[_RTC_PIN]
        apic, vector = vcpu.apic, entry & 0xFF
        if apic is None or not self._irqchip.matches(apic, entry >> 56, logical=bool(entry >> 11 & 1)):
            return
        if (apic.irr | apic.isr) >> vector & 1:
            self._rtc.setdefault(vcpu.id, vector)
        else:
            self._rtc.pop(vcpu.id, None)

"""The IOAPIC of a full irqchip (`arch/x86/kvm/ioapic.c`)."""

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.irqchip import Irqchip

IOAPIC_DEFAULT_BASE: Final = 0xFEC0_0000
PINS: Final = 24
IOAPIC_STATE: Final = struct.Struct("<QIIII24Q")  # struct kvm_ioapic_state
_MASKED: Final = 1 << 16
_LEVEL: Final = 1 << 15
_REMOTE_IRR: Final = 1 << 14
_DELIVERY_STATUS: Final = 1 << 12
_WINDOW_BYTES: Final = 0x100


class Ioapic:
    """24 pins, each with a 64-bit redirection entry."""

    def __init__(self, irqchip: "Irqchip") -> None:
        self._irqchip: Final = irqchip
        self.base = IOAPIC_DEFAULT_BASE
        self.ioregsel = 0
        self.id = 0
        self.irr = 0
        self.entries = [_MASKED] * PINS
        self._levels: Final = [0] * PINS

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """Change a pin on behalf of `source`; return as kvm_ioapic_set_irq() does."""
        levels = self._levels
        levels[pin] = levels[pin] | 1 << source if level else levels[pin] & ~(1 << source)
        mask = 1 << pin
        if not levels[pin]:
            self.irr &= ~mask
            return 1
        entry = self.entries[pin]
        edge = not entry & _LEVEL
        old_irr = self.irr
        self.irr |= mask
        if (edge and old_irr == self.irr) or (not edge and entry & _REMOTE_IRR):
            return 0
        return self._service(pin)

    def _service(self, pin: int) -> int:
        entry = self.entries[pin]
        if entry & _MASKED:
            return -1
        level = bool(entry & _LEVEL)
        if level and entry & _REMOTE_IRR:
            return -1
        if not level:
            self.irr &= ~(1 << pin)
        taken = self._irqchip.deliver(
            entry >> 56 & 0xFF,
            logical=bool(entry >> 11 & 1),
            mode=entry >> 8 & 7,
            vector=entry & 0xFF,
            trigger_level=level,
        )
        if taken and level:
            self.entries[pin] |= _REMOTE_IRR
        return taken

    def end_of_interrupt(self, vector: int) -> None:
        """Take a broadcast EOI for `vector`: level pins with that vector may fire again."""
        for pin, entry in enumerate(self.entries):
            if entry & 0xFF == vector and entry & _LEVEL:
                self.entries[pin] = entry & ~_REMOTE_IRR
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
        return 0

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
        if entry & _LEVEL and self.irr >> index & 1 and not entry & _MASKED:
            self._service(index)

    # ---- KVM_GET_IRQCHIP, KVM_SET_IRQCHIP ---------------------------------------------------------------

    def state(self) -> bytes:
        """Return ``struct kvm_ioapic_state``."""
        return IOAPIC_STATE.pack(self.base, self.ioregsel, self.id, self.irr, 0, *self.entries)

    def set_state(self, data: bytes) -> None:
        """Take ``struct kvm_ioapic_state``; pins that it says are raised fire."""
        self.base, self.ioregsel, self.id, irr, _pad, *entries = IOAPIC_STATE.unpack(data[: IOAPIC_STATE.size])
        self.entries = list(entries)
        self.irr = 0
        for pin in range(PINS):
            if irr >> pin & 1:
                self.irr |= 1 << pin
                self._service(pin)

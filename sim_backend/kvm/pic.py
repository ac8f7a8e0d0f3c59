"""The pair of 8259 interrupt controllers of a full irqchip (`arch/x86/kvm/i8259.c`)."""

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.irqchip import Irqchip

PIC_STATE: Final = struct.Struct("<16B")  # struct kvm_pic_state
_FIELDS: Final = (
    "last_irr",
    "irr",
    "imr",
    "isr",
    "priority_add",
    "irq_base",
    "read_reg_select",
    "poll",
    "special_mask",
    "init_state",
    "auto_eoi",
    "rotate_on_auto_eoi",
    "special_fully_nested_mode",
    "init4",
    "elcr",
    "elcr_mask",
)
_SLAVE_PIN: Final = 2


class Pic:
    """One 8259; attributes are the fields of ``struct kvm_pic_state``."""

    def __init__(self, elcr_mask: int) -> None:
        self.last_irr = 0
        self.irr = 0
        self.imr = 0
        self.isr = 0
        self.priority_add = 0
        self.irq_base = 0
        self.read_reg_select = 0
        self.poll = 0
        self.special_mask = 0
        self.init_state = 0
        self.auto_eoi = 0
        self.rotate_on_auto_eoi = 0
        self.special_fully_nested_mode = 0
        self.init4 = 0
        self.elcr = 0
        self.elcr_mask = elcr_mask

    def state(self) -> bytes:
        """Return ``struct kvm_pic_state``."""
        return PIC_STATE.pack(*(getattr(self, name) for name in _FIELDS))

    def set_state(self, data: bytes) -> None:
        """Take ``struct kvm_pic_state``."""
        for name, value in zip(_FIELDS, PIC_STATE.unpack(data[: PIC_STATE.size]), strict=True):
            setattr(self, name, value)

    def set_pin(self, pin: int, level: bool) -> int:
        """Change a pin; return 1 when the request is new, 0 when it coalesced, -1 when it is masked."""
        mask = 1 << pin
        taken = 1
        if self.elcr & mask:
            if level:
                taken = int(not self.irr & mask)
                self.irr |= mask
                self.last_irr |= mask
            else:
                self.irr &= ~mask
                self.last_irr &= ~mask
        elif level:
            if not self.last_irr & mask:
                taken = int(not self.irr & mask)
                self.irr |= mask
            self.last_irr |= mask
        else:
            self.last_irr &= ~mask
        return -1 if self.imr & mask else taken

    def _priority(self, mask: int) -> int:
        if not mask:
            return 8
        priority = 0
        while not mask & 1 << (priority + self.priority_add & 7):
            priority += 1
        return priority

    def pending_pin(self) -> int:
        """Return the pin that requests service now, or -1."""
        requested = self._priority(self.irr & ~self.imr)
        if requested == 8:
            return -1
        in_service = self.isr & ~self.imr if self.special_mask else self.isr
        if requested >= self._priority(in_service):
            return -1
        return requested + self.priority_add & 7

    def acknowledge(self, pin: int) -> None:
        """INTA for `pin`."""
        self.isr |= 1 << pin
        if not self.elcr & 1 << pin:
            self.irr &= ~(1 << pin)
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = pin + 1 & 7
            self.isr &= ~(1 << pin)

    def write(self, port: int, value: int) -> None:
        """OUT to the command (0) or data (1) port."""
        if port:
            self._write_data(value)
        elif value & 0x10:
            elcr, elcr_mask, base, edges = self.elcr, self.elcr_mask, self.irq_base, self.last_irr
            self.__init__(elcr_mask)  # type: ignore[misc]  # ICW1 resets everything but these
            self.elcr, self.irq_base, self.last_irr = elcr, base, edges
            self.init4 = value & 1
            self.init_state = 1
        elif value & 0x08:
            if value & 0x04:
                self.poll = 1
            if value & 0x02:
                self.read_reg_select = value & 1
            if value & 0x40:
                self.special_mask = value >> 5 & 1
        else:
            self._end_of_interrupt(value)

    def _end_of_interrupt(self, value: int) -> None:
        command = value >> 5
        if command in (0, 4):
            self.rotate_on_auto_eoi = command >> 2
        elif command in (1, 5):
            priority = self._priority(self.isr)
            if priority != 8:
                pin = priority + self.priority_add & 7
                if command == 5:
                    self.priority_add = pin + 1 & 7
                self.isr &= ~(1 << pin)
        elif command == 3:
            self.isr &= ~(1 << (value & 7))
        elif command == 6:
            self.priority_add = (value & 7) + 1 & 7
        elif command == 7:
            self.priority_add = (value & 7) + 1 & 7
            self.isr &= ~(1 << (value & 7))

    def _write_data(self, value: int) -> None:
        if self.init_state == 0:
            self.imr = value
        elif self.init_state == 1:
            self.irq_base = value & 0xF8
            self.init_state = 2
        elif self.init_state == 2:
            self.init_state = 3 if self.init4 else 0
        else:
            self.special_fully_nested_mode = value >> 4 & 1
            self.auto_eoi = value >> 1 & 1
            self.init_state = 0

    def read(self, port: int) -> int:
        """IN from the command (0) or data (1) port."""
        if self.poll:
            self.poll = 0
            pin = self.pending_pin()
            if pin < 0:
                return 7
            self.acknowledge(pin)
            return 0x80 | pin
        if port:
            return self.imr
        return self.isr if self.read_reg_select else self.irr


class PicPair:
    """Master and slave; the slave's output is the master's pin 2."""

    def __init__(self, irqchip: "Irqchip") -> None:
        self._irqchip: Final = irqchip
        self.chips: Final = (Pic(0xF8), Pic(0xDE))
        self._levels: Final = [0] * 16  # per pin: one bit per irq source

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """Change one of 16 pins on behalf of `source`."""
        levels = self._levels
        levels[pin] = levels[pin] | 1 << source if level else levels[pin] & ~(1 << source)
        taken = self.chips[pin >> 3].set_pin(pin & 7, bool(levels[pin]))
        self.update()
        return taken

    def update(self) -> None:
        """Propagate the slave and tell the boot vCPU when there is something to take."""
        master, slave = self.chips
        if slave.pending_pin() >= 0:
            master.set_pin(_SLAVE_PIN, True)
            master.set_pin(_SLAVE_PIN, False)
        if master.pending_pin() >= 0:
            for vcpu in self._irqchip.vm.vcpus:
                if vcpu.apic is not None and vcpu.apic.accepts_extint():
                    vcpu.kick()

    def has_interrupt(self) -> bool:
        """Tell whether INTR is raised."""
        return self.chips[0].pending_pin() >= 0

    def acknowledge(self) -> int:
        """INTA: return the vector (spurious 7 or 15 when the request is gone)."""
        master, slave = self.chips
        pin = master.pending_pin()
        if pin < 0:
            return master.irq_base + 7
        if pin == _SLAVE_PIN:
            slave_pin = slave.pending_pin()
            if slave_pin >= 0:
                slave.acknowledge(slave_pin)
            else:
                slave_pin = 7
            vector = slave.irq_base + slave_pin
        else:
            vector = master.irq_base + pin
        master.acknowledge(pin)
        self.update()
        return vector

    def port_write(self, port: int, value: int) -> bool:
        """OUT of one byte; False when the port is not one of ours."""
        if port in (0x20, 0x21, 0xA0, 0xA1):
            self.chips[port >> 7].write(port & 1, value)
        elif port in (0x4D0, 0x4D1):
            chip = self.chips[port & 1]
            chip.elcr = value & chip.elcr_mask
        else:
            return False
        self.update()
        return True

    def port_read(self, port: int) -> int | None:
        """IN of one byte; None when the port is not one of ours."""
        if port in (0x20, 0x21, 0xA0, 0xA1):
            return self.chips[port >> 7].read(port & 1)
        if port in (0x4D0, 0x4D1):
            return self.chips[port & 1].elcr
        return None

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
_ELCR: Final = 0x4D0
_BASES: Final = (0x20, 0xA0, _ELCR)


class Pic:
    """One 8259; attributes are the fields of ``struct kvm_pic_state``."""

    def __init__(self, pair: "PicPair", elcr_mask: int, *, is_master: bool) -> None:
        self._pair: Final = pair
        self.is_master: Final = is_master
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
        in_service = self.isr
        if self.special_fully_nested_mode and self.is_master:
            in_service &= ~(1 << _SLAVE_PIN)
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
            self._clear_in_service(pin)

    def take_polled(self) -> int:
        """Give the pin that requests service to a poll and return it, or -1."""
        pin = self.pending_pin()
        if pin >= 0:
            self.irr &= ~(1 << pin)
            self._clear_in_service(pin)
        return pin

    def write(self, port: int, value: int) -> bool:
        """OUT to the command (0) or data (1) port; True where KVM looks at the output afterwards."""
        if port:
            return self._write_data(value)
        if value & 0x10:
            self._begin_initialization(value)
            return False
        if value & 0x08:
            if value & 0x04:
                self.poll = 1
            if value & 0x02:
                self.read_reg_select = value & 1
            if value & 0x40:
                self.special_mask = value >> 5 & 1
            return False
        return self._end_of_interrupt(value)

    def _begin_initialization(self, icw1: int) -> None:
        """Take ICW1 (`kvm_pic_reset()`): what is in service, the vector base and the ELCR stay."""
        edges = self.irr & ~self.elcr
        self.init4 = icw1 & 1
        self.last_irr = 0
        self.irr &= self.elcr
        self.imr = self.priority_add = self.special_mask = self.read_reg_select = 0
        if not self.init4:
            self.special_fully_nested_mode = self.auto_eoi = 0
        self.init_state = 1
        if self._pair.somebody_accepts():
            for pin in range(8):
                if edges >> pin & 1:
                    self._clear_in_service(pin)

    def _end_of_interrupt(self, value: int) -> bool:
        command = value >> 5
        if command in (0, 4):
            self.rotate_on_auto_eoi = command >> 2
            return False
        if command in (1, 5):
            priority = self._priority(self.isr)
            if priority == 8:
                return False
            pin = priority + self.priority_add & 7
            if command == 5:
                self.priority_add = pin + 1 & 7
            self._clear_in_service(pin)
        elif command == 3:
            self._clear_in_service(value & 7)
        elif command == 6:
            self.priority_add = value + 1 & 7
        elif command == 7:
            self.priority_add = (value & 7) + 1 & 7
            self._clear_in_service(value & 7)
        else:
            return False
        return True

    def _clear_in_service(self, pin: int) -> None:
        self.isr &= ~(1 << pin)
        self._pair.acknowledged(pin if self.is_master else pin + 8)

    def _write_data(self, value: int) -> bool:
        if self.init_state == 0:
            self.imr = value
            return True
        if self.init_state == 1:
            self.irq_base = value & 0xF8
            self.init_state = 2
        elif self.init_state == 2:
            self.init_state = 3 if self.init4 else 0
        else:
            self.special_fully_nested_mode = value >> 4 & 1
            self.auto_eoi = value >> 1 & 1
            self.init_state = 0
        return False

    def read(self, port: int) -> int:
        """IN from the command (0) or data (1) port."""
        if port:
            return self.imr
        return self.isr if self.read_reg_select else self.irr


class PicPair:
    """Master and slave; the slave's output is the master's pin 2. Every method takes the irqchip's lock."""

    def __init__(self, irqchip: "Irqchip") -> None:
        self._irqchip: Final = irqchip
        self._lock: Final = irqchip.lock
        self.chips: Final = (Pic(self, 0xF8, is_master=True), Pic(self, 0xDE, is_master=False))
        self._levels: Final = [0] * 16  # per pin: one bit per irq source
        self._output = False  # INTR, as of the last time that KVM looked

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """Change one of 16 pins on behalf of `source`."""
        with self._lock:
            levels = self._levels
            levels[pin] = levels[pin] | 1 << source if level else levels[pin] & ~(1 << source)
            taken = self.chips[pin >> 3].set_pin(pin & 7, bool(levels[pin]))
            self.update()
            return taken

    def update(self) -> None:
        """Propagate the slave; tell the first vCPU that listens when INTR rises (`pic_update_irq()`)."""
        with self._lock:
            master, slave = self.chips
            if slave.pending_pin() >= 0:
                master.set_pin(_SLAVE_PIN, True)
                master.set_pin(_SLAVE_PIN, False)
            before, self._output = self._output, master.pending_pin() >= 0
            if self._output and not before:
                for vcpu in self._irqchip.vm.vcpus:
                    if vcpu.apic is not None and vcpu.apic.accepts_extint():
                        vcpu.kick()
                        return

    def somebody_accepts(self) -> bool:
        """Tell whether any vCPU lets interrupts of the pair through."""
        return any(vcpu.apic is not None and vcpu.apic.accepts_extint() for vcpu in self._irqchip.vm.vcpus)

    def acknowledged(self, pin: int) -> None:
        """Tell who wants to know that the interrupt of `pin` is over."""
        self._irqchip.acknowledged(pin >> 3, pin & 7)

    def has_interrupt(self) -> bool:
        """Tell whether INTR is raised."""
        return self._output

    def acknowledge(self) -> int:
        """INTA: return the vector (spurious 7 or 15 when the request is gone)."""
        with self._lock:
            self._output = False
            master, slave = self.chips
            pin = master.pending_pin()
            if pin < 0:
                vector = master.irq_base + 7
            else:
                vector = master.irq_base + pin
                master.acknowledge(pin)
                if pin == _SLAVE_PIN:
                    slave_pin = slave.pending_pin()
                    if slave_pin >= 0:
                        slave.acknowledge(slave_pin)
                    else:
                        slave_pin = 7
                    vector = slave.irq_base + slave_pin
            self.update()
            return vector

    def port_write(self, port: int, data: bytes) -> bool:
        """OUT; False when the port is not one of ours. Only single bytes do anything."""
        if not self._holds(port, len(data)):
            return False
        if len(data) > 1:
            return True
        with self._lock:
            if port >= _ELCR:
                chip = self.chips[port & 1]
                chip.elcr = data[0] & chip.elcr_mask
            elif self.chips[port >> 7].write(port & 1, data[0]):
                self.update()
        return True

    def port_read(self, port: int, length: int) -> bytes | None:
        """IN; None when the port is not one of ours. Only single bytes are anything but zero."""
        if not self._holds(port, length):
            return None
        if length > 1:
            return bytes(length)
        with self._lock:
            if port >= _ELCR:
                return bytes((self.chips[port & 1].elcr,))
            chip = self.chips[port >> 7]
            return bytes((self._poll(chip) if chip.poll else chip.read(port & 1),))

    @staticmethod
    def _holds(port: int, length: int) -> bool:
        return any(base <= port and port + length <= base + 2 for base in _BASES)

    def _poll(self, chip: Pic) -> int:
        chip.poll = 0
        pin = chip.take_polled()
        if pin >= 0 and not chip.is_master:
            self.chips[0].isr &= ~(1 << _SLAVE_PIN)
            self.chips[0].irr &= ~(1 << _SLAVE_PIN)
        if pin < 0 or not chip.is_master or pin != _SLAVE_PIN:
            self.update()
        return 0x80 | pin if pin >= 0 else 7

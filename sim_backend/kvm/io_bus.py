"""Devices that KVM serves in the kernel: ioeventfds, coalesced zones, PIC, IOAPIC and PIT registers.

An access goes to the first device that takes it; what nobody takes goes to user space.
"""

import contextlib
import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import COALESCED_PAGE_OFFSET

if TYPE_CHECKING:
    from sim_backend.kvm.irqchip import Irqchip
    from sim_backend.kvm.pit import Pit
    from sim_backend.kvm.vcpu import Vcpu

_ONE: Final = struct.pack("<Q", 1)
_COALESCED: Final = struct.Struct("<QII8s")  # phys_addr len pio data
_RING_MAX: Final = (4096 - 8) // _COALESCED.size
_APIC_WINDOW: Final = 0x1000


MMIO_BUS: Final = 0
PIO_BUS: Final = 1
CCW_BUS: Final = 2  # another architecture's: registered, never signalled
_IOEVENTFD_PIO: Final = 2
_IOEVENTFD_VIRTIO_CCW_NOTIFY: Final = 8


def bus_of(flags: int) -> int:
    """Return the bus that KVM_IOEVENTFD flags name (ioeventfd_bus_from_flags)."""
    if flags & _IOEVENTFD_PIO:
        return PIO_BUS
    return CCW_BUS if flags & _IOEVENTFD_VIRTIO_CCW_NOTIFY else MMIO_BUS


class IoEventFd:
    """One registered ioeventfd: a write that matches signals it."""

    def __init__(self, fd: int, address: int, length: int, datamatch: int | None, bus: int) -> None:
        self.fd = fd  # our own duplicate
        self.inode = os.fstat(fd).st_ino
        self.address = address
        self.length = length  # [bytes], 0: any
        self.datamatch = datamatch
        self.bus = bus

    @classmethod
    def open(cls, fd: int, address: int, length: int, datamatch: int | None, bus: int) -> "IoEventFd":
        """Duplicate `fd`; EBADF when it is closed, EINVAL when it is no eventfd."""
        return cls(duplicate_eventfd(fd), address, length, datamatch, bus)

    def matches(self, address: int, data: bytes) -> bool:
        """Tell whether a write fires it."""
        if address != self.address:
            return False
        if not self.length:
            return True
        if len(data) != self.length:
            return False
        return self.datamatch is None or int.from_bytes(data, "little") == self.datamatch

    def collides(self, other: "IoEventFd") -> bool:
        """Tell whether both would answer the same write."""
        return (
            self.bus == other.bus
            and self.address == other.address
            and (not self.length or not other.length or self.length == other.length)
            and (self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch)
        )


class CoalescedZone:
    """A range whose writes are queued in the ring behind kvm_run instead of exiting."""

    def __init__(self, address: int, size: int, pio: bool) -> None:
        self.address = address
        self.size = size
        self.pio = pio

    def holds(self, address: int, length: int) -> bool:
        """Tell whether a write lies wholly inside."""
        return self.address <= address and address + length <= self.address + self.size


class IoBus:
    """The buses of one VM."""

    def __init__(self) -> None:
        self.eventfds: list[IoEventFd] = []
        self.zones: list[CoalescedZone] = []
        self.irqchip: Irqchip | None = None
        self.pit: Pit | None = None
        self.empty = True

    def write(self, vcpu: "Vcpu", address: int, data: bytes, *, pio: bool) -> bool:
        """Offer a write to the devices; True when one took it."""
        for eventfd in self.eventfds:
            if eventfd.bus == pio and eventfd.matches(address, data):
                os.write(eventfd.fd, _ONE)
                return True
        irqchip = self.irqchip
        if irqchip is not None:
            if pio:
                if irqchip.pic is not None and irqchip.pic.port_write(address, data):
                    return True
                if self.pit is not None and len(data) == 1 and self.pit.port_write(address, data[0]):
                    return True
            elif self._apic_write(vcpu, irqchip, address, data):
                return True
        for zone in self.zones:
            if zone.pio == pio and zone.holds(address, len(data)):
                return self._coalesce(vcpu, address, data, pio)
        return False

    def read(self, vcpu: "Vcpu", address: int, length: int, *, pio: bool) -> bytes | None:
        """Offer a read to the devices; None when nobody takes it."""
        irqchip = self.irqchip
        if irqchip is None:
            return None
        if pio:
            if irqchip.pic is not None and (data := irqchip.pic.port_read(address, length)) is not None:
                return data
            value = self.pit.port_read(address) if self.pit is not None and length == 1 else None
            return None if value is None else bytes((value,))
        apic = vcpu.apic
        if apic is not None and apic.hw_enabled and not apic.x2apic:
            base = apic.base & ~0xFFF
            if base <= address < base + _APIC_WINDOW:
                value = apic.read(address - base >> 4) if not address & 0xF else 0
                return ((value or 0) & 0xFFFF_FFFF).to_bytes(4, "little")[:length].ljust(length, b"\0")
        if irqchip.ioapic is not None and irqchip.ioapic.holds(address):
            return irqchip.ioapic.read(address).to_bytes(4, "little")[:length].ljust(length, b"\0")
        return None

    @staticmethod
    def _apic_write(vcpu: "Vcpu", irqchip: "Irqchip", address: int, data: bytes) -> bool:
        apic = vcpu.apic
        if apic is not None and apic.hw_enabled and not apic.x2apic:
            base = apic.base & ~0xFFF
            if base <= address < base + _APIC_WINDOW:
                if len(data) == 4 and not address & 0xF:
                    apic.write(address - base >> 4, int.from_bytes(data, "little"))
                return True
        if irqchip.ioapic is not None and irqchip.ioapic.holds(address):
            with irqchip.lock:
                irqchip.ioapic.write(address, int.from_bytes(data[:4], "little"))
            return True
        return False

    @staticmethod
    def _coalesce(vcpu: "Vcpu", address: int, data: bytes, pio: bool) -> bool:
        """Queue a write in the ring; False (so it exits) when the ring is full."""
        ring = vcpu.vm.vcpus[0].run if vcpu.vm.vcpus else vcpu.run
        head = COALESCED_PAGE_OFFSET // 4
        first, last = ring.u32[head], ring.u32[head + 1]
        if last >= _RING_MAX or (last + 1) % _RING_MAX == first:
            return False
        _COALESCED.pack_into(
            ring.u8, COALESCED_PAGE_OFFSET + 8 + last * _COALESCED.size, address, len(data), int(pio), data
        )
        ring.u32[head + 1] = (last + 1) % _RING_MAX
        return True

    # ---- registration -----------------------------------------------------------------------------------

    def add_eventfd(self, eventfd: IoEventFd) -> None:
        """Register; EEXIST where another would answer the same write."""
        if any(eventfd.collides(other) for other in self.eventfds):
            os.close(eventfd.fd)
            raise Errno(errno.EEXIST)
        self.eventfds.append(eventfd)

    def remove_eventfd(self, fd: int, address: int, length: int, datamatch: int, flags: int) -> bool:
        """Unregister the one with the same parameters; False when there is none, EBADF/EINVAL for the fd."""
        probe = duplicate_eventfd(fd)
        try:
            inode = os.fstat(probe).st_ino
        finally:
            os.close(probe)
        wanted = datamatch if flags & 1 else None
        for eventfd in self.eventfds:
            if (eventfd.inode, eventfd.address, eventfd.length, eventfd.datamatch, eventfd.bus) == (
                inode,
                address,
                length,
                wanted,
                bus_of(flags),
            ) and same_eventfd(eventfd.fd, fd):
                self.eventfds.remove(eventfd)
                os.close(eventfd.fd)
                return True
        return False

    def remove_zones(self, address: int, size: int, pio: bool) -> None:
        """Unregister every coalesced zone of that kind that holds the range."""
        self.zones = [zone for zone in self.zones if zone.pio != pio or not zone.holds(address, size)]

    def close(self) -> None:
        """Let every eventfd go, at VM destruction."""
        for eventfd in self.eventfds:
            with contextlib.suppress(OSError):
                os.close(eventfd.fd)
        self.eventfds.clear()


def duplicate_eventfd(fd: int) -> int:
    """Return our own descriptor of the eventfd `fd`; EBADF when it is closed, EINVAL when it is something else."""
    signed = fd - (1 << 32) if fd >> 31 else fd
    try:
        kind = str(Path(f"/proc/self/fd/{signed}").readlink())
    except OSError:
        raise Errno(errno.EBADF) from None
    if kind != "anon_inode:[eventfd]":
        raise Errno(errno.EINVAL)
    return os.dup(signed)


def same_eventfd(left: int, right: int) -> bool:
    """Tell whether two descriptors are the same eventfd; all of them share one inode, so ask for their ids."""
    return _eventfd_id(left) == _eventfd_id(right)


def _eventfd_id(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:  # noqa: PTH123 - procfs
        for line in info:
            if line.startswith("eventfd-id"):
                return line.split(":")[1].strip()
    return ""

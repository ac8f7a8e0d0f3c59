"""Interrupt ioctls of a VM fd: irqchip, routing, MSIs, irqfds, ioeventfds, coalesced MMIO."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.eventfds import Irqfds
from sim_backend.kvm.files import Files
from sim_backend.kvm.io_bus import CoalescedZone, IoEventFd, bus_of
from sim_backend.kvm.ioapic import IOAPIC_STATE
from sim_backend.kvm.irqchip import Irqchip
from sim_backend.kvm.pic import PIC_STATE
from sim_backend.kvm.pit import PIT_STATE_BYTES, Pit
from sim_backend.kvm.routing import (
    IOAPIC_PINS,
    KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_MAX_IRQ_ROUTES,
    GsiRoute,
    GsiRoutes,
)

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_IRQ_LEVEL: Final = struct.Struct("<II")
_IRQCHIP_HEADER: Final = struct.Struct("<II")
_IRQCHIP_UNION: Final = 512
_ROUTING_HEADER: Final = struct.Struct("<II")
_ROUTING_ENTRY: Final = struct.Struct("<IIII32s")
_MSI: Final = struct.Struct("<IIIII12x")  # address_lo address_hi data flags devid
_IRQFD: Final = struct.Struct("<IIII16x")  # fd gsi flags resamplefd
_IOEVENTFD: Final = struct.Struct("<QQIiI36x")  # datamatch addr len fd flags
_ZONE: Final = struct.Struct("<QII")  # addr size pio
KVM_MSI_VALID_DEVID: Final = 1
KVM_IRQFD_DEASSIGN: Final = 1
KVM_IRQFD_RESAMPLE: Final = 2
IOEVENTFD_DATAMATCH: Final = 1
IOEVENTFD_PIO: Final = 2
IOEVENTFD_DEASSIGN: Final = 4
_IOEVENTFD_VALID: Final = 31  # the last two flags are nothing that user space needs here, and pass
_U64: Final = (1 << 64) - 1
_USER_SOURCE: Final = 0  # KVM_USERSPACE_IRQ_SOURCE_ID


class IrqIoctls:
    """The interrupt ioctls of one VM."""

    def __init__(self, vm: "Vm", files: Files) -> None:
        self._vm: Final = vm
        self._files: Final = files

    # ---- irqchip ----------------------------------------------------------------------------------------

    def create_irqchip(self, _arg: int) -> int:
        """KVM_CREATE_IRQCHIP. Since Linux 7.2, ENOTTY on a TD (6.16: succeeds)."""
        vm = self._vm
        with vm.lock:
            if vm.irqchip is not None:
                raise Errno(errno.EEXIST)
            if vm.ops.has_protected_eoi and not vm.host.profile.behaves("create_irqchip_on_td"):
                raise Errno(errno.ENOTTY)
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.irqchip = Irqchip(vm, split=False)
            vm.io_bus.irqchip = vm.irqchip
        return 0

    def _full(self) -> Irqchip:
        irqchip = self._vm.irqchip
        if irqchip is None or irqchip.split:
            raise Errno(errno.ENXIO)
        return irqchip

    def get_irqchip(self, argp: int) -> int:
        """KVM_GET_IRQCHIP."""
        mm = self._vm.mm
        chip_id, pad = _IRQCHIP_HEADER.unpack_from(mm.read(argp, 8 + _IRQCHIP_UNION))
        irqchip = self._full()
        if irqchip.pic is not None and chip_id in (0, 1):
            state = irqchip.pic.chips[chip_id].state()
        elif irqchip.ioapic is not None and chip_id == 2:
            state = irqchip.ioapic.state()
        else:
            raise Errno(errno.EINVAL)
        mm.write(argp + 8, state)
        mm.write(argp, _IRQCHIP_HEADER.pack(chip_id, pad))
        return 0

    def set_irqchip(self, argp: int) -> int:
        """KVM_SET_IRQCHIP."""
        data = self._vm.mm.read(argp, 8 + _IRQCHIP_UNION)
        chip_id, _pad = _IRQCHIP_HEADER.unpack_from(data)
        irqchip = self._full()
        with irqchip.lock:
            if irqchip.pic is not None and chip_id in (0, 1):
                irqchip.pic.chips[chip_id].set_state(data[8 : 8 + PIC_STATE.size])
                irqchip.pic.update()
            elif irqchip.ioapic is not None and chip_id == 2:
                irqchip.ioapic.set_state(data[8 : 8 + IOAPIC_STATE.size])
            else:
                raise Errno(errno.EINVAL)
        return 0

    # ---- PIT --------------------------------------------------------------------------------------------

    def create_pit(self, _arg: int) -> int:
        """KVM_CREATE_PIT."""
        return self._create_pit(0)

    def create_pit2(self, argp: int) -> int:
        """KVM_CREATE_PIT2."""
        (flags,) = struct.unpack_from("<I", self._vm.mm.read(argp, 64))
        return self._create_pit(flags)

    def _create_pit(self, flags: int) -> int:
        vm = self._vm
        with vm.lock:
            if vm.pit is not None:
                raise Errno(errno.EEXIST)
            if vm.irqchip is None or vm.irqchip.split:
                raise Errno(errno.ENOENT)
            vm.pit = vm.io_bus.pit = Pit(vm, flags)
        return 0

    def get_pit2(self, argp: int) -> int:
        """KVM_GET_PIT2."""
        pit = self._vm.pit
        if pit is None:
            raise Errno(errno.ENXIO)
        self._vm.mm.write(argp, pit.state())
        return 0

    def set_pit2(self, argp: int) -> int:
        """KVM_SET_PIT2."""
        data = self._vm.mm.read(argp, PIT_STATE_BYTES)
        pit = self._vm.pit
        if pit is None:
            raise Errno(errno.ENXIO)
        pit.set_state(data)
        return 0

    def reinject_control(self, argp: int) -> int:
        """KVM_REINJECT_CONTROL."""
        (reinject,) = struct.unpack_from("<B", self._vm.mm.read(argp, 32))
        pit = self._vm.pit
        if pit is None:
            raise Errno(errno.ENXIO)
        pit.reinject = bool(reinject)
        return 0

    # ---- lines and messages -----------------------------------------------------------------------------

    def irq_line(self, argp: int) -> int:
        """KVM_IRQ_LINE."""
        self._irq_line(argp, line_status=False)
        return 0

    def irq_line_status(self, argp: int) -> int:
        """KVM_IRQ_LINE_STATUS: the same, with the delivery result written back."""
        status = self._irq_line(argp, line_status=True)
        self._vm.mm.write(argp, struct.pack("<i", status))
        return 0

    def _irq_line(self, argp: int, *, line_status: bool) -> int:
        gsi, level = _IRQ_LEVEL.unpack(self._vm.mm.read(argp, 8))
        irqchip = self._vm.irqchip
        if irqchip is None:
            raise Errno(errno.ENXIO)
        return irqchip.set_irq(_USER_SOURCE, gsi, bool(level), line_status=line_status)

    def signal_msi(self, argp: int) -> int:
        """KVM_SIGNAL_MSI: returns how many vCPUs took it; none to take it is EPERM."""
        low, high, data, flags, _devid = _MSI.unpack(self._vm.mm.read(argp, 32))
        irqchip = self._vm.irqchip
        if irqchip is None or flags & ~KVM_MSI_VALID_DEVID:
            raise Errno(errno.EINVAL)
        taken = irqchip.send_msi(low, high, data)
        if taken < 0:
            raise Errno(errno.EPERM)  # the bare -1 of kvm_irq_delivery_to_apic()
        return taken

    def set_gsi_routing(self, argp: int) -> int:
        """KVM_SET_GSI_ROUTING: replaces the whole table."""
        vm = self._vm
        nr, flags = _ROUTING_HEADER.unpack(vm.mm.read(argp, 8))
        irqchip = vm.irqchip
        if irqchip is None or nr > KVM_MAX_IRQ_ROUTES or flags:
            raise Errno(errno.EINVAL)
        data = vm.mm.read(argp + 8, nr * _ROUTING_ENTRY.size)
        routes: list[GsiRoute] = []
        by_gsi: dict[int, list[GsiRoute]] = {}
        for gsi, kind, entry_flags, _pad, union in _ROUTING_ENTRY.iter_unpack(data):
            earlier = by_gsi.setdefault(gsi, [])
            route = self._route(irqchip, earlier, gsi, kind, entry_flags, union)
            earlier.append(route)
            routes.append(route)
        irqchip.routes = GsiRoutes(routes)
        return 0

    def _route(
        self, irqchip: Irqchip, earlier: list[GsiRoute], gsi: int, kind: int, flags: int, union: bytes
    ) -> GsiRoute:
        if gsi >= KVM_MAX_IRQ_ROUTES:
            raise Errno(errno.EINVAL)
        words = struct.unpack_from("<4I", union)
        if kind == KVM_IRQ_ROUTING_MSI:
            if flags & ~KVM_MSI_VALID_DEVID:
                raise Errno(errno.EINVAL)
            if self._vm.x2apic_32bit_ids and words[1] & 0xFF:
                raise Errno(errno.EINVAL)
            route = GsiRoute(gsi, msi=(words[0], words[1], words[2]))
        else:
            if flags:
                raise Errno(errno.EINVAL)
            if kind == KVM_IRQ_ROUTING_HV_SINT and self._vm.host.profile.hyperv_cpuid:
                return GsiRoute(gsi, chip=3)
            if kind != KVM_IRQ_ROUTING_IRQCHIP or irqchip.split:
                raise Errno(errno.EINVAL)
            chip, pin = words[0], words[1]
            if chip > 2 or pin >= (IOAPIC_PINS if chip == 2 else 8):
                raise Errno(errno.EINVAL)
            route = GsiRoute(gsi, chip=chip, pin=pin)
        for other in earlier:
            # Only one route of a kind per GSI: an MSI shares with nobody, chips not with themselves.
            if other.msi is not None or route.msi is not None or other.chip == route.chip:
                raise Errno(errno.EINVAL)
        return route

    # ---- eventfds ---------------------------------------------------------------------------------------

    def irqfd(self, argp: int) -> int:
        """KVM_IRQFD."""
        vm = self._vm
        fd, gsi, flags, resamplefd = _IRQFD.unpack(vm.mm.read(argp, 32))
        if flags & ~(KVM_IRQFD_DEASSIGN | KVM_IRQFD_RESAMPLE):
            raise Errno(errno.EINVAL)
        if vm.irqfds is None:
            vm.irqfds = Irqfds(vm)
        if flags & KVM_IRQFD_DEASSIGN:
            vm.irqfds.deassign(fd, gsi)
            return 0
        if vm.irqchip is None:
            raise Errno(errno.EINVAL)
        if flags & KVM_IRQFD_RESAMPLE:
            if vm.irqchip.split or vm.ops.has_protected_eoi:
                raise Errno(errno.EINVAL)
            vm.irqfds.assign(fd, gsi, resamplefd)
        else:
            vm.irqfds.assign(fd, gsi, None)
        return 0

    def ioeventfd(self, argp: int) -> int:
        """KVM_IOEVENTFD."""
        vm = self._vm
        datamatch, address, length, fd, flags = _IOEVENTFD.unpack(vm.mm.read(argp, 64))
        if flags & IOEVENTFD_DEASSIGN:
            if not vm.io_bus.remove_eventfd(fd, address, length, datamatch, flags):
                raise Errno(errno.ENOENT)
            return 0
        if length not in (0, 1, 2, 4, 8) or address + length > _U64:
            raise Errno(errno.EINVAL)
        if flags & ~_IOEVENTFD_VALID:
            raise Errno(errno.EINVAL)
        if not length and flags & (IOEVENTFD_DATAMATCH | IOEVENTFD_PIO):
            raise Errno(errno.EINVAL)
        vm.io_bus.add_eventfd(
            IoEventFd.open(
                fd,
                address,
                length,
                datamatch if flags & IOEVENTFD_DATAMATCH else None,
                bus_of(flags),
            )
        )
        return 0

    def register_coalesced_mmio(self, argp: int) -> int:
        """KVM_REGISTER_COALESCED_MMIO."""
        address, size, pio = _ZONE.unpack(self._vm.mm.read(argp, 16))
        if pio not in (0, 1):
            raise Errno(errno.EINVAL)
        self._vm.io_bus.zones.append(CoalescedZone(address, size, bool(pio)))
        return 0

    def unregister_coalesced_mmio(self, argp: int) -> int:
        """KVM_UNREGISTER_COALESCED_MMIO: unknown zones are fine."""
        address, size, pio = _ZONE.unpack(self._vm.mm.read(argp, 16))
        if pio not in (0, 1):
            raise Errno(errno.EINVAL)
        self._vm.io_bus.remove_zones(address, size, bool(pio))
        return 0

"""A VM's interrupt controllers and how messages travel between them (`arch/x86/kvm/irq.c`, `irq_comm.c`).

Split: local APICs only, the IOAPIC is user space's and interrupts come in as MSIs.
Full: an 8259 pair and an IOAPIC too.
"""

import errno
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.apic_map import ApicMap, LogicalMode
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.ioapic import Ioapic
from sim_backend.kvm.lapic import MODE_FIXED, MODE_LOWEST, LocalApic
from sim_backend.kvm.pic import PicPair
from sim_backend.kvm.routing import GsiRoute, GsiRoutes

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_BROADCAST: Final = 0xFFFF_FFFF
_XAPIC_BROADCAST: Final = 0xFF
_SELF, _ALL_WITH_SELF = 1, 2  # shorthands
IRQFD_RESAMPLE_SOURCE: Final = 1  # KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID


class Irqchip:
    """The in-kernel irqchip of one VM."""

    def __init__(self, vm: "Vm", *, split: bool, reserved_pins: int = 0) -> None:
        self.vm: Final = vm
        self.split: Final = split
        self.reserved_pins: Final = reserved_pins
        self.lock: Final = threading.RLock()
        self.pic: Final = None if split else PicPair(self)
        self.ioapic: Final = None if split else Ioapic(self)
        self.routes = GsiRoutes.split() if split else GsiRoutes.full()
        self.apic_map: ApicMap | None = None

    def destroy(self) -> None:
        """Let everything go, at VM destruction."""
        self.routes = GsiRoutes.split()

    # ---- messages ---------------------------------------------------------------------------------------

    def deliver(
        self,
        destination: int,
        *,
        logical: bool,
        mode: int,
        vector: int,
        level: bool = True,
        trigger_level: bool = False,
        shorthand: int = 0,
        source: LocalApic | None = None,
        redirection_hint: bool = False,
        taken_by: list[int] | None = None,
    ) -> int:
        """Deliver a message to every local APIC that it names; return how many took it, -1 when none matched.

        Lowest-priority delivery, and an MSI with the redirection hint, goes to one of them, chosen by the vector
        (KVM's `vector_hashing`). The ids of the vCPUs whose local APIC took it are appended to `taken_by`.
        """
        to_one = mode == MODE_LOWEST or redirection_hint
        targets: Sequence[LocalApic | None]
        if shorthand == _SELF and source is not None:
            targets, taken = (source,), 0
        elif not shorthand and (mapped := self._by_map(destination, logical, source)) is not None:
            targets, taken = mapped, 0
            if logical and to_one and targets:
                targets = (targets[vector % len(targets)],)
        else:
            targets, taken = self._by_asking(destination, logical, shorthand, source), -1
            if to_one and not logical and destination == _XAPIC_BROADCAST:
                mode = MODE_FIXED
                to_one = redirection_hint
            if to_one:
                enabled = [apic for apic in targets if apic.sw_enabled]
                targets = (enabled[vector % len(enabled)],) if enabled else ()
        for apic in targets:
            if apic is not None:
                accepted = apic.accept(mode, vector, level=level, trigger_level=trigger_level)
                taken = max(taken, 0) + accepted
                if accepted and taken_by is not None and mode in (MODE_FIXED, MODE_LOWEST):
                    taken_by.append(apic.vcpu.id)
        return taken

    def send_ipi(self, source: LocalApic, icr_low: int, destination: int) -> None:
        """Send what a local APIC's ICR says."""
        self.deliver(
            destination,
            logical=bool(icr_low >> 11 & 1),
            mode=icr_low >> 8 & 7,
            vector=icr_low & 0xFF,
            level=bool(icr_low >> 14 & 1),
            trigger_level=bool(icr_low >> 15 & 1),
            shorthand=icr_low >> 18 & 3,
            source=source,
        )

    def send_pv_ipi(self, bitmaps: Sequence[int], first: int, icr: int, *, bits: int = 64) -> int:
        """Send the IPI of `icr` to the APIC ids that the bitmaps of `bits` each name, from `first` on.

        Return how many took it (`__pv_send_ipi()`); the checks of the hypercall are the caller's.
        """
        level, trigger_level = bool(icr >> 14 & 1), bool(icr >> 15 & 1)
        taken = 0
        for word, bitmap in enumerate(bitmaps):
            begin = first + word * bits & 0xFFFF_FFFF
            for bit in range(bits):
                apic = self.physical_apic(begin + bit) if bitmap >> bit & 1 else None
                if apic is not None:
                    taken += apic.accept(icr >> 8 & 7, icr & 0xFF, level=level, trigger_level=trigger_level)
        return taken

    def send_msi(self, address_lo: int, address_hi: int, data: int, *, level: bool = True) -> int:
        """Deliver an MSI. Raise ``Errno(EINVAL)`` where the 32-bit id format is broken."""
        if self.vm.x2apic_32bit_ids and address_hi & 0xFF:
            raise Errno(errno.EINVAL)
        return self.deliver(
            self.msi_destination(address_lo, address_hi),
            logical=bool(address_lo >> 2 & 1),
            mode=data >> 8 & 7,
            vector=data & 0xFF,
            level=level,
            trigger_level=bool(data >> 15 & 1),
            redirection_hint=bool(address_lo >> 3 & 1),
        )

    def end_of_interrupt(self, apic: LocalApic, vector: int) -> None:
        """Tell the IOAPIC, or user space's, that a vector ended (`kvm_ioapic_send_eoi()`).

        The IOAPIC tells who resampled a line even where the guest suppresses the broadcast.
        """
        vcpu = apic.vcpu
        if self.ioapic is None:
            if not apic.suppresses_eoi_broadcast and self.routes.split_level_vector(self, apic, vector):
                vcpu.ioapic_eoi_vector = vector
            return
        with self.lock:
            if self.ioapic.handles(vcpu, vector):
                by_level = bool(apic.tmr >> vector & 1) and not apic.suppresses_eoi_broadcast
                self.ioapic.end_of_interrupt(vcpu, vector, by_level=by_level)

    # ---- who waits for the end of an interrupt --------------------------------------------------------------

    def wants_acknowledgement(self, chip: int, pin: int) -> bool:
        """Tell whether a resampling irqfd, or the PIT, waits for the end of the pin's interrupts."""
        gsi = self.routes.gsi_of(chip, pin)
        if gsi < 0:
            return False
        pit, irqfds = self.vm.pit, self.vm.irqfds
        return (pit is not None and pit.reinject and gsi == 0) or (irqfds is not None and irqfds.resamples(gsi))

    def acknowledged(self, chip: int, pin: int) -> None:
        """Lower a resampled line whose interrupt is over, and ask for it again (`kvm_notify_acked_irq()`)."""
        irqfds = self.vm.irqfds
        gsi = self.routes.gsi_of(chip, pin)
        if irqfds is not None and irqfds.resamples(gsi):
            self.set_irq(IRQFD_RESAMPLE_SOURCE, gsi, False)
            irqfds.resample(gsi)

    def resample(self, chip: int, pin: int) -> bool:
        """Ask for a resampled line again; False where nobody resamples it (`kvm_notify_irqfd_resampler()`)."""
        irqfds = self.vm.irqfds
        gsi = self.routes.gsi_of(chip, pin)
        if irqfds is None or not irqfds.resamples(gsi):
            return False
        irqfds.resample(gsi)
        return True

    def msi_destination(self, address_lo: int, address_hi: int) -> int:
        """Return the APIC id or logical destination that an MSI's address names."""
        destination = address_lo >> 12 & 0xFF
        return destination | address_hi & 0xFFFF_FF00 if self.vm.x2apic_32bit_ids else destination

    # ---- GSIs -------------------------------------------------------------------------------------------

    def set_irq(self, source: int, gsi: int, level: bool, *, line_status: bool = False) -> int:
        """Raise or lower a GSI on behalf of `source`; return the delivery result of kvm_set_irq()."""
        result = -1
        for route in self.routes.of(gsi):
            taken = self._fire(route, source, level, line_status)
            if taken >= 0:
                result = taken + max(result, 0)
        return result

    def _fire(self, route: GsiRoute, source: int, level: bool, line_status: bool) -> int:
        if route.msi is not None:
            return self.send_msi(*route.msi) if level else -1
        with self.lock:
            if route.chip == 2 and self.ioapic is not None:
                return self.ioapic.set_irq(route.pin, source, level, line_status=line_status)
            if self.pic is not None:
                return self.pic.set_irq(route.pin + (8 if route.chip == 1 else 0), source, level)
        return -1

    # ---- destinations -----------------------------------------------------------------------------------

    def recalculate_apic_map(self) -> None:
        """Make the map from ids to APICs again: something that it is made of changed."""
        self.apic_map = ApicMap(self.vm.vcpus, ids_have_32_bits=self.vm.x2apic_32bit_ids)

    def physical_apic(self, apic_id: int) -> LocalApic | None:
        """Return the APIC that the map has under a physical id."""
        return self.apic_map.physical(apic_id) if self.apic_map is not None else None

    def _by_map(self, destination: int, logical: bool, source: LocalApic | None) -> Sequence[LocalApic | None] | None:
        """Return whom the map names, None where each APIC has to be asked (`kvm_apic_map_get_dest_lapic()`)."""
        apics = self.apic_map
        if apics is None or not apics.usable:
            return None
        if self.vm.x2apic_broadcast_quirk_disabled:
            everybody = destination == _BROADCAST or (
                destination == _XAPIC_BROADCAST and apics.logical_mode is not LogicalMode.X2APIC
            )
        else:
            everybody = destination == (_BROADCAST if source is not None and source.x2apic else _XAPIC_BROADCAST)
        if everybody:
            return None
        return apics.logical(destination) if logical else (apics.physical(destination),)

    def _by_asking(self, destination: int, logical: bool, shorthand: int, source: LocalApic | None) -> list[LocalApic]:
        """Return whom a message means, by asking each APIC (`kvm_apic_match_dest()`)."""
        found = []
        for vcpu in self.vm.vcpus:
            apic = vcpu.apic
            if apic is None or not apic.hw_enabled:
                continue
            if shorthand:
                meant = shorthand == _ALL_WITH_SELF or (apic is source) == (shorthand == _SELF)
            else:
                meant = self.matches(apic, destination, logical=logical, source=source)
            if meant:
                found.append(apic)
        return found

    def matches(self, apic: LocalApic, destination: int, *, logical: bool, source: LocalApic | None = None) -> bool:
        """Tell whether a message to `destination` means `apic`."""
        if (
            not self.vm.x2apic_broadcast_quirk_disabled
            and source is None
            and destination == _XAPIC_BROADCAST
            and apic.x2apic
        ):
            destination = _BROADCAST
        return apic.matches_logical(destination) if logical else apic.matches_physical(destination)

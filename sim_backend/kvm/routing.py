"""GSI routing: which pin or MSI a global system interrupt number stands for (``KVM_SET_GSI_ROUTING``)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.irqchip import Irqchip
    from sim_backend.kvm.lapic import LocalApic

KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_IRQ_ROUTING_HV_SINT: Final = 4
KVM_IRQ_ROUTING_XEN_EVTCHN: Final = 5
KVM_MAX_IRQ_ROUTES: Final = 4096
IOAPIC_PINS: Final = 24


@dataclass(frozen=True, slots=True)
class GsiRoute:
    """One route: a pin of an in-kernel chip (0, 1: the 8259s, 2: the IOAPIC), or an MSI."""

    gsi: int
    chip: int = 0
    pin: int = 0
    msi: tuple[int, int, int] | None = None  # address_lo, address_hi, data


class GsiRoutes:
    """A whole routing table; replaced, never changed."""

    def __init__(self, routes: list[GsiRoute]) -> None:
        self._by_gsi: dict[int, list[GsiRoute]] = {}
        self._gsis: dict[tuple[int, int], int] = {}
        for route in routes:
            self._by_gsi.setdefault(route.gsi, []).append(route)
            if route.msi is None:
                self._gsis[route.chip, route.pin] = route.gsi

    @classmethod
    def split(cls) -> "GsiRoutes":
        """Return the table of a fresh split irqchip: no routes."""
        return cls([])

    @classmethod
    def full(cls) -> "GsiRoutes":
        """Return the default table of a full irqchip: GSIs 0-15 to the 8259s too, 0-23 to the IOAPIC."""
        routes = [GsiRoute(gsi, chip=gsi >> 3, pin=gsi & 7) for gsi in range(16)]
        return cls(routes + [GsiRoute(gsi, chip=2, pin=gsi) for gsi in range(IOAPIC_PINS)])

    def of(self, gsi: int) -> list[GsiRoute]:
        """Return the routes of `gsi`."""
        return self._by_gsi.get(gsi, [])

    def gsi_of(self, chip: int, pin: int) -> int:
        """Return the GSI that a pin of an in-kernel chip serves, or -1."""
        return self._gsis.get((chip, pin), -1)

    def split_level_vector(self, irqchip: "Irqchip", apic: "LocalApic", vector: int) -> bool:
        """Tell whether a level-triggered MSI route of user space's IOAPIC sends `vector` to `apic`.

        Its EOI exits with a split irqchip (`kvm_scan_ioapic_routes()`).
        """
        for gsi in range(irqchip.reserved_pins):
            for route in self.of(gsi):
                if route.msi is None or not route.msi[2] >> 15 & 1 or route.msi[2] & 0xFF != vector:
                    continue
                low, high, _data = route.msi
                if irqchip.matches(apic, irqchip.msi_destination(low, high), logical=bool(low >> 2 & 1)):
                    return True
        return False

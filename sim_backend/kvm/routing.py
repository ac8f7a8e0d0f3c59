"""GSI routing: which pin or MSI a global system interrupt number stands for (``KVM_SET_GSI_ROUTING``)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

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
        for route in routes:
            self._by_gsi.setdefault(route.gsi, []).append(route)

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

    def split_level_vector(self, vcpu: "Vcpu", vector: int) -> bool:
        """Tell whether a level-triggered MSI route sends `vector` to `vcpu` (its EOI exits with a split irqchip)."""
        irqchip = vcpu.vm.irqchip
        if irqchip is None or vcpu.apic is None:
            return False
        for gsi in range(irqchip.reserved_pins):
            for route in self.of(gsi):
                if route.msi is not None and route.msi[2] >> 15 & 1 and route.msi[2] & 0xFF == vector:
                    return True
        return False

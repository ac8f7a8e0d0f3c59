"""The map that KVM keeps from APIC ids to local APICs (`struct kvm_apic_map`, `kvm_recalculate_apic_map()`).

It is a picture of one moment: made again when a mode, an id, LDR, DFR or SPIV's enable bit changes. A vCPU that was
created after that moment is not in it, and gets no message that names it until something makes the map again.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.lapic import DFR, LDR, LocalApic

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_DFR_FLAT: Final = 0xFFFF_FFFF
_XAPIC_IDS: Final = 256
_CLUSTER_BITS: Final = 16


class LogicalMode(Enum):
    """How logical destinations are to be read, for all APICs of the VM at once."""

    SW_DISABLED = auto()
    """No APIC is enabled by software: logical destinations reach nobody."""
    FLAT = auto()
    CLUSTER = auto()
    X2APIC = auto()
    MIXED = auto()
    """The APICs differ, or share an id: each has to be asked (KVM_APIC_MODE_MAP_DISABLED)."""


class ApicMap:
    """Who has which physical and logical id."""

    def __init__(self, vcpus: "Iterable[Vcpu]", *, ids_have_32_bits: bool) -> None:
        self.usable = True
        """False when two APICs share a physical id: each APIC has to be asked."""
        self.logical_mode = LogicalMode.SW_DISABLED
        self.max_apic_id = _XAPIC_IDS - 1
        self._physical: Final[dict[int, LocalApic]] = {}
        self._flat: Final[dict[int, LocalApic]] = {}
        self._clusters: Final[dict[int, dict[int, LocalApic]]] = {}
        self._ids_have_32_bits: Final = ids_have_32_bits
        for vcpu in vcpus:
            apic = vcpu.apic
            if apic is None or not apic.hw_enabled:
                continue
            self.max_apic_id = max(self.max_apic_id, vcpu.id)
            if not self._add_physical(apic):
                self.usable = False
                return
            self._add_logical(apic)

    def physical(self, destination: int) -> LocalApic | None:
        """Return the APIC with this physical id."""
        return self._physical.get(destination)

    def logical(self, destination: int) -> list[LocalApic | None] | None:
        """Return whom each set bit of a logical destination names, None for an empty place.

        Return None itself where only asking each APIC gives the answer.
        """
        match self.logical_mode:
            case LogicalMode.MIXED:
                return None
            case LogicalMode.SW_DISABLED:
                return []
            case LogicalMode.X2APIC:
                first, members = (destination >> 16) * _CLUSTER_BITS, self._physical
                if first > self.max_apic_id:
                    return []
                places = destination & (1 << min(self.max_apic_id - first + 1, _CLUSTER_BITS)) - 1
            case LogicalMode.FLAT:
                first, members, places = 0, self._flat, destination & 0xFF
            case LogicalMode.CLUSTER:
                first, members, places = 0, self._clusters.get(destination >> 4 & 0xF, {}), destination & 0xF
        return [members.get(first + bit) for bit in range(_CLUSTER_BITS) if places >> bit & 1]

    def _add_physical(self, apic: LocalApic) -> bool:
        """Enter `apic`; False where its id is taken."""
        x2apic_id, xapic_id = apic.vcpu.id, apic.xapic_id
        if self._ids_have_32_bits:
            if apic.x2apic or x2apic_id >= _XAPIC_IDS:
                self._physical[x2apic_id] = apic
            if not apic.x2apic:
                self._physical.setdefault(xapic_id, apic)
            return True
        return self._physical.setdefault(x2apic_id if apic.x2apic else xapic_id, apic) is apic

    def _add_logical(self, apic: LocalApic) -> None:
        ldr = apic.regs[LDR]
        if self.logical_mode is LogicalMode.MIXED or not apic.sw_enabled or not ldr:
            return
        if apic.x2apic:
            mode = LogicalMode.X2APIC
        else:
            mode = LogicalMode.FLAT if apic.regs[DFR] == _DFR_FLAT else LogicalMode.CLUSTER
        if self.logical_mode not in (LogicalMode.SW_DISABLED, mode):
            self.logical_mode = LogicalMode.MIXED
            return
        self.logical_mode = mode
        if apic.x2apic:
            return  # the logical id follows from the physical one
        logical = ldr >> 24
        if mode is LogicalMode.FLAT:
            members, mask = self._flat, logical
        else:
            members, mask = self._clusters.setdefault(logical >> 4, {}), logical & 0xF
        if not mask:
            return
        place = (mask & -mask).bit_length() - 1
        if mask & mask - 1 or place in members:
            self.logical_mode = LogicalMode.MIXED
        else:
            members[place] = apic

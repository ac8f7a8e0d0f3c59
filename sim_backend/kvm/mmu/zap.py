"""Zaps that both page tables of a VM see: which ranges go when a slot, an attribute or a file changes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.ops import VmOps


def zap_slot(ops: "VmOps", slot: "Memslot") -> None:
    """Drop the leaf mappings of `slot`, private and shared, and nothing else (`kvm_mmu_zap_memslot()`)."""
    ops.zap_gfn_range(slot.base_gfn, slot.base_gfn + slot.npages, private=True, shared=True)

"""Resolving a guest-physical address to host memory, with the exits that say why it cannot be.

The part of KVM's page-fault path (`arch/x86/kvm/mmu/mmu.c`, `kvm_mmu_faultin_pfn()`) that ordinary VMs and TDs
share: attribute before slot, private pages from guest_memfd, shared pages from the slot's user memory.
"""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.memslots import KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY
from sim_backend.kvm.mmu.shared_ept import EXECUTE, READ, WRITE, SharedEpt

if TYPE_CHECKING:
    from sim_backend.hw.memory import PhysicalMemory
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
_PAGE: Final = 4096


def memory_fault(vcpu: "Vcpu", gfn: int, *, private: bool, error: int = errno.EFAULT) -> Errno:
    """Fill KVM_EXIT_MEMORY_FAULT for the 4 KiB page `gfn` and return the ``Errno`` that goes with it."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_MEMORY_FAULT
    run.u64[UNION_U64] = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
    run.u64[UNION_U64 + 1] = gfn << 12
    run.u64[UNION_U64 + 2] = _PAGE
    return Errno(error)


def private_page(vcpu: "Vcpu", gfn: int) -> int:
    """Return the HPA of the guest_memfd page behind the private `gfn`.

    Raise ``Errno`` with a memory-fault exit filled in: EFAULT (the attribute says shared, no slot, no
    guest_memfd, its file is closed), EHWPOISON, ENOMEM.
    """
    vm = vcpu.vm
    if not vm.attributes.is_private(gfn):
        raise memory_fault(vcpu, gfn, private=True)
    slot = vm.find_memslot(gfn)
    if slot is None or slot.gmem is None:
        raise memory_fault(vcpu, gfn, private=True)
    try:
        return slot.gmem.get_page(slot.gmem_index(gfn))
    except Errno as error:
        raise memory_fault(vcpu, gfn, private=True, error=error.errno) from None


def map_shared(memory: "PhysicalMemory", ept: SharedEpt, slot: "Memslot", gfn: int, *, write: bool) -> bool:
    """Map the user page behind the shared `gfn` of `slot` into `ept`; False when `write` hits a read-only slot.

    Raise ``Errno(EFAULT)`` when there is no such user memory (the exit reason stays what it was), ENOMEM or
    `OutOfMemory`. A slot whose guest_memfd can be mapped takes its shared pages from there as well.
    """
    read_only = bool(slot.flags & KVM_MEM_READONLY)
    if write and read_only:
        return False
    access = READ | EXECUTE
    if slot.flags & KVM_MEM_GUEST_MEMFD and slot.gmem is not None and slot.gmem.flags & 1:
        hpa = slot.gmem.get_page(slot.gmem_index(gfn))
        writable = True
    else:
        hva = slot.hva(gfn)
        writable = not read_only and slot.mm.fault_in(hva, _PAGE, write=True)
        if not writable and (write or not slot.mm.fault_in(hva, _PAGE, write=False)):
            raise Errno(errno.EFAULT)
        hpa = slot.user_hpa(memory, gfn)
    if writable and (write or slot.dirty_bitmap is None):
        access |= WRITE
    ept.map(gfn, hpa, access)
    if write:
        slot.mark_dirty(gfn)
    return True

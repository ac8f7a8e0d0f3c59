"""The second-level page tables of an ordinary VM, and its faults (`arch/x86/kvm/mmu/mmu.c`, TDP).

The tables are a dictionary: frame to leaf entry in EPT format. That is all the CPU asks for, and nobody else looks.
"""

import errno
import threading
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.memslots import KVM_MEM_READONLY, Memslot

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm

EPT_READ: Final = 1
EPT_WRITE: Final = 2
EPT_EXECUTE: Final = 4
_WRITE_BACK: Final = 6 << 3
_READ_EXECUTE: Final = EPT_READ | EPT_EXECUTE | _WRITE_BACK
KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3


class MmioFault(Exception):  # noqa: N818 - an outcome, not an error
    """No memory answers this access: the instruction must be emulated."""


class DirectMmu:
    """One VM's tables; satisfies `sim_backend.cpu.engine.SecondLevel`."""

    def __init__(self, vm: "Vm") -> None:
        self._vm: Final = vm
        self._pages: dict[int, int] = {}
        self._lock: Final = threading.Lock()
        self._interpreted: Final = vm.host.profile.behaves("interprets_guest_code")
        self._read_fault_maps_writable: Final = vm.host.profile.behaves("read_fault_maps_writable")
        self._mmio: dict[int, int] = {}  # frames marked as MMIO, with the memslots' generation (mark_mmio_spte)
        self.generation = 0  # rises whenever something was taken away: CPUs must forget translations

    # ---- the CPU's view ---------------------------------------------------------------------------------

    def walk(self, gpa: int) -> int:
        """Return the leaf entry for the page of `gpa`, 0 when there is none."""
        return self._pages.get(gpa >> 12, 0)

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        """Refuse: an ordinary VM has no virtualization exceptions."""
        del qualification, gla, gpa
        return False

    # ---- taking away ------------------------------------------------------------------------------------

    def unmap(self, start: int, end: int) -> None:
        """Drop the mappings of frames [start, end) and make every CPU forget them."""
        with self._lock:
            pages = self._pages
            if end - start > len(pages):
                gone = [gfn for gfn in pages if start <= gfn < end]
            else:
                gone = [gfn for gfn in range(start, end) if gfn in pages]
            for gfn in gone:
                del pages[gfn]
        if gone:
            self.flush()

    def write_protect(self, start: int, end: int) -> None:
        """Take the write permission of frames [start, end) away."""
        with self._lock:
            pages = self._pages
            changed = False
            for gfn in [gfn for gfn in pages if start <= gfn < end]:
                if pages[gfn] & EPT_WRITE:
                    pages[gfn] &= ~EPT_WRITE
                    changed = True
        if changed:
            self.flush()

    def flush(self) -> None:
        """Make every vCPU leave the guest and drop cached translations before it goes back."""
        self.generation += 1
        self._vm.kick_all()

    # ---- faults -----------------------------------------------------------------------------------------

    def fault(self, vcpu: "Vcpu", gpa: int, *, write: bool, prefault: bool = False) -> None:
        """Map the page of `gpa`. Raise `MmioFault`, or Errno with the MEMORY_FAULT exit filled in."""
        vm = self._vm
        gfn = gpa >> 12
        private = vm.ops.has_private_mem and vm.attributes.is_private(gfn)
        marked = self._mmio.get(gfn)
        vcpu.vendor.hit_mmio_mark = marked is not None
        if marked is not None and not prefault:
            if marked == vm.memslots[0].generation:
                raise MmioFault
            if private:  # a fault on a marked entry counts as shared, and no change of attributes takes the mark away
                raise memory_fault(vcpu, gpa, private=False)
        slot = vm.find_memslot(gfn)
        if slot is None:
            if private:
                raise memory_fault(vcpu, gpa, private=True)
            self._mmio[gfn] = vm.memslots[0].generation
            raise MmioFault
        if private and slot.gmem is None:
            raise memory_fault(vcpu, gpa, private=True)
        if write and slot.flags & KVM_MEM_READONLY:
            raise MmioFault
        if private or (slot.is_gmem_only() and not self._interpreted):
            self._map_gmem(vcpu, slot, gpa, private=private)
        else:
            self._map_user(slot, gfn, write=write)

    def _map_gmem(self, vcpu: "Vcpu", slot: Memslot, gpa: int, *, private: bool) -> None:
        gfn = gpa >> 12
        if slot.gmem is None:
            raise memory_fault(vcpu, gpa, private=private)
        try:
            hpa = slot.gmem.get_page(slot.gmem_index(gfn))
        except Errno as error:
            raise memory_fault(vcpu, gpa, private=private, err=error.errno) from None
        with self._lock:
            self._pages[gfn] = hpa | _READ_EXECUTE | EPT_WRITE
            self._mmio.pop(gfn, None)

    def _map_user(self, slot: Memslot, gfn: int, *, write: bool) -> None:
        hva = slot.hva(gfn)
        if not slot.mm.fault_in(hva, 4096, write):
            raise Errno(errno.EFAULT)
        entry = slot.user_hpa(self._vm.host.memory, gfn) | _READ_EXECUTE
        writable = write
        if not write and not slot.flags & KVM_MEM_READONLY and self._read_fault_maps_writable:
            writable = slot.mm.maps_writable(hva)
        if writable:
            entry |= EPT_WRITE
            slot.mark_dirty(gfn)
        with self._lock:
            self._pages[gfn] = entry
            self._mmio.pop(gfn, None)


def memory_fault(vcpu: "Vcpu", gpa: int, *, private: bool, err: int = errno.EFAULT) -> Errno:
    """Fill KVM_EXIT_MEMORY_FAULT in and return the error that goes with it."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_MEMORY_FAULT
    run.u64[UNION_U64] = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
    run.u64[UNION_U64 + 1] = gpa & ~0xFFF
    run.u64[UNION_U64 + 2] = 4096
    return Errno(err)

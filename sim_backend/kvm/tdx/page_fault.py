"""EPT violations of a TD: what KVM maps, and when it gives up (`tdx_handle_ept_violation()`)."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.mmu.fault import map_shared, memory_fault, private_page
from sim_backend.kvm.mmu.shared_ept import SharedEpt
from sim_backend.kvm.signals import SIGNALS
from sim_backend.kvm.tdx.private_memory import add_tables, augment_page, mirror_of
from sim_backend.kvm.tdx.root import load_root

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

_ACCESS_WRITE: Final = 1 << 1  # exit qualification
_ACCESS_INSTRUCTION: Final = 1 << 2
_PROTECTION: Final = 0x38 | 1 << 6  # R, W, X of the entry, and X for user-mode linear addresses
_BUSY_TRIES: Final = 64  # before the run loop gets a chance to see signals
_EEQ_TYPE_MASK: Final = 0xF
_EEQ_PENDING_EPT_VIOLATION: Final = 6


def handle_ept_violation(ops: "TdxOps", vcpu: "Vcpu", qualification: int, extended: int, gpa: int) -> bool:
    """Make `gpa` accessible; return True to enter the guest again, or raise ``Errno``."""
    td = ops.td
    shared_bit = td.gfn_shared_bit << 12
    if gpa & shared_bit:
        if qualification & _ACCESS_INSTRUCTION:
            return ops.shared_instruction_fetch(vcpu, qualification)
        fault_shared(ops, vcpu, (gpa & ~shared_bit) >> 12, write=bool(qualification & _ACCESS_WRITE))
        return True
    if (
        not ops.host.is_v17
        and extended & _EEQ_TYPE_MASK == _EEQ_PENDING_EPT_VIOLATION
        and not qualification & _PROTECTION
    ):
        # The guest disabled #VE for pending pages and touched one that it had not accepted.
        ops.vm.die()
        raise Errno(errno.EIO)
    fault_private(ops, vcpu, gpa >> 12)
    return True


def fault_private(ops: "TdxOps", vcpu: "Vcpu", gfn: int) -> None:
    """Map the private page `gfn` as PENDING, retrying while the module is busy. Raise ``Errno``.

    When it stays busy, or somebody kicks the vCPU, the run loop looks for events and the guest faults again.
    """
    td = ops.td
    for _ in range(_BUSY_TRIES):
        # Attribute, slot and page are looked up under the lock that a zap takes: what is mapped here is either
        # still what they say, or the zap comes later and finds it.
        with td.mmu_lock:
            page = private_page(vcpu, gfn)
            if mirror_of(ops).lookup(gfn) >= 0:
                return  # another vCPU was faster
            if add_tables(ops, vcpu.lp, gfn) and augment_page(ops, vcpu.lp, gfn, page):
                return
        if ops.vm.dead:
            raise Errno(errno.EIO)
        if vcpu.kicked:
            return


def fault_shared(ops: "TdxOps", vcpu: "Vcpu", gfn: int, *, write: bool) -> None:
    """Map the shared page `gfn`, or let its next access raise a #VE when there is no slot. Raise ``Errno``."""
    with ops.td.mmu_lock:
        if ops.vm.attributes.is_private(gfn):
            raise memory_fault(vcpu, gfn, private=False)
        slot = ops.vm.find_memslot(gfn)
        ept = shared_ept_of(ops, vcpu)
        try:
            if slot is None or not map_shared(ops.host.memory, ept, slot, gfn, write=write):
                ept.mark_mmio(gfn)
        except OutOfMemory:
            raise Errno(errno.ENOMEM) from None


def shared_ept_of(ops: "TdxOps", vcpu: "Vcpu") -> SharedEpt:
    """Return the shared EPT, loading the root first if this vCPU has none."""
    load_root(ops, vcpu)
    ept = ops.td.shared
    if ept is None:
        raise Errno(errno.EIO)
    return ept


def pre_fault(ops: "TdxOps", vcpu: "Vcpu", gfn: int) -> None:
    """Map `gfn` ahead of its first access (`kvm_arch_vcpu_pre_fault_memory()`).

    Raise ``Errno``: EINVAL (S-bit), ENOENT (shared, no slot), EFAULT, EHWPOISON, ENOMEM, EINTR, EIO.
    """
    if gfn & ops.td.gfn_shared_bit:
        raise Errno(errno.EINVAL)
    load_root(ops, vcpu)
    if not ops.vm.attributes.is_private(gfn):
        if ops.vm.find_memslot(gfn) is None:
            raise Errno(errno.ENOENT)
        fault_shared(ops, vcpu, gfn, write=False)
        return
    signals = SIGNALS.mark()
    while True:
        fault_private(ops, vcpu, gfn)
        if mirror_of(ops).lookup(gfn) >= 0:
            return
        if SIGNALS.since(signals):
            raise Errno(errno.EINTR)

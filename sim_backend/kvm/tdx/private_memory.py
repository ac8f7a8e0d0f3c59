"""Private pages of a TD: every SEAMCALL that adds one, maps one or takes one away.

The hooks that KVM's MMU calls for the mirror EPT (`tdx_sept_*()` in `arch/x86/kvm/vmx/tdx.c`). A function that
adds returns False when the module was busy: the caller decides whether to try again. All of them want
`td.mmu_lock`.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RAX
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.tdx.seamcalls import SUCCESS, is_busy
from sim_backend.kvm.tdx.td import TdState
from uapi_ctypes.tdx_leaves import SeamcallLeaf

if TYPE_CHECKING:
    from sim_backend.kvm.mmu.mirror_ept import MirrorEpt
    from sim_backend.kvm.tdx.ops import TdxOps

_PAGE_ADD: Final = int(SeamcallLeaf.TDH_MEM_PAGE_ADD)
EXTEND_BYTES: Final = 256  # TDH.MR.EXTEND measures a chunk of this size


def mirror_of(ops: "TdxOps") -> "MirrorEpt":
    """Return the mirror EPT, which exists from KVM_TDX_INIT_VM on."""
    mirror = ops.td.mirror
    if mirror is None:
        raise Errno(errno.EINVAL)
    return mirror


def add_tables(ops: "TdxOps", lp: int, gfn: int) -> bool:
    """Give the module the Secure-EPT pages that the way to `gfn` lacks, top down.

    Raise ``Errno(ENOMEM)``, or ``Errno(EIO)`` with the VM bugged when the module refuses.
    """
    td, host = ops.td, ops.host
    mirror = mirror_of(ops)
    for level, first_gfn in mirror.missing_tables(gfn):
        try:
            page = host.pages.alloc_zeroed()
        except OutOfMemory:
            raise Errno(errno.ENOMEM) from None
        status = host.seamcalls.mem_sept_add(lp, td.tdr, first_gfn << 12, level, page)
        if status != SUCCESS:
            host.pages.free(page)
            if is_busy(status):
                return False
            ops.vm.bug()
            raise Errno(errno.EIO)
        mirror.link_table(first_gfn, level, page)
    return True


def augment_page(ops: "TdxOps", lp: int, gfn: int, page: int) -> bool:
    """Map the page at `page` as PENDING at `gfn`, whose tables are there (TDH.MEM.PAGE.AUG)."""
    td = ops.td
    status = ops.host.seamcalls.mem_page_aug(lp, td.tdr, gfn << 12, page)
    if status == SUCCESS:
        mirror_of(ops).map(gfn, page)
        return True
    if is_busy(status):
        return False
    ops.vm.bug()
    raise Errno(errno.EIO)


def add_page(ops: "TdxOps", lp: int, gfn: int, page: int, source: int, *, measure: bool) -> int:
    """Copy the page at `source` into `page`, map it at `gfn`, and measure its contents if asked to.

    Return TDH.MEM.PAGE.ADD's status. Raise ``Errno(EIO)`` when a TDH.MR.EXTEND fails, the VM bugged unless
    this kernel lets that pass.
    """
    td, host = ops.td, ops.host
    gpa = gfn << 12
    batch = host.add_and_extend
    if batch is not None and measure:
        regs = [_PAGE_ADD, gpa, td.tdr, 0, 0, 0, 0, 0, page, source, 0, 0, 0, 0, 0, 0]
        batch(lp, regs)
        if regs[RAX] == SUCCESS:
            mirror_of(ops).map(gfn, page)
        return regs[RAX]
    status = host.seamcalls.mem_page_add(lp, td.tdr, gpa, page, source)
    if status != SUCCESS:
        return status
    mirror_of(ops).map(gfn, page)
    if measure:
        for chunk in range(gpa, gpa + 4096, EXTEND_BYTES):
            if host.seamcalls.mr_extend(lp, td.tdr, chunk) != SUCCESS:
                _measure_failed(ops)
    return SUCCESS


def _measure_failed(ops: "TdxOps") -> None:
    if not ops.host.profile.behaves("tdx_page_add_error_does_not_bug"):
        ops.vm.bug()
    raise Errno(errno.EIO)


def remove_page(ops: "TdxOps", lp: int, gfn: int) -> None:
    """Block `gfn`, get it out of every TLB, remove it, and flush its cache lines. The VM is bugged on failure."""
    td, host = ops.td, ops.host
    calls, tdr, gpa = host.seamcalls, td.tdr, gfn << 12
    mirror = mirror_of(ops)
    page = mirror.lookup(gfn)
    mirror.unmap(gfn)
    if td.hkid == 0:
        # v17: the HKID is gone, the page can be taken back without any tracking.
        if calls.phymem_page_reclaim(lp, page) != SUCCESS:
            _give_up(ops, page)
        return
    if _without_vcpus(ops, lambda: calls.mem_range_block(lp, tdr, gpa)) != SUCCESS:
        _give_up(ops, page)
        return
    track(ops, lp)
    if _without_vcpus(ops, lambda: calls.mem_page_remove(lp, tdr, gpa)) != SUCCESS:
        _give_up(ops, page)
        return
    if calls.phymem_page_wbinvd(lp, host.keyed(page, td.hkid)) != SUCCESS:
        ops.vm.bug()


def _give_up(ops: "TdxOps", page: int) -> None:
    ops.vm.bug()
    ops.host.pages.leak(page)


def track(ops: "TdxOps", lp: int) -> None:
    """Begin a new TLB epoch and make every vCPU leave the old one (nothing to do before the TD has run)."""
    if ops.td.state is not TdState.RUNNABLE:
        return
    if _without_vcpus(ops, lambda: ops.host.seamcalls.mem_track(lp, ops.td.tdr)) != SUCCESS:
        ops.vm.bug()
    ops.vm.kick_all()


def _without_vcpus(ops: "TdxOps", call: Callable[[], int]) -> int:
    """Execute `call`; when the module is busy, once more with every vCPU held outside the TD."""
    status = call()
    if not is_busy(status):
        return status
    td = ops.td
    td.wait_for_sept_zap = True
    try:
        ops.vm.kick_all()
        return call()
    finally:
        td.wait_for_sept_zap = False

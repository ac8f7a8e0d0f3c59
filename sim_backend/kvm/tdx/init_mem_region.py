"""KVM_TDX_INIT_MEM_REGION: copy, encrypt, map and measure the TD's initial pages."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.memslots import KVM_MEM_GUEST_MEMFD
from sim_backend.kvm.tdx.private_memory import add_page, add_tables, mirror_of
from sim_backend.kvm.tdx.root import load_root
from sim_backend.kvm.tdx.seamcalls import SUCCESS, is_busy
from sim_backend.kvm.tdx.source_window import SourceWindow
from sim_backend.kvm.tdx.td import TdState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_TDX_MEASURE_MEMORY_REGION: Final = 1 << 0
REGION: Final = struct.Struct("<QQQ")  # kvm_tdx_init_mem_region: source_addr, gpa, nr_pages
_PAGE: Final = 4096
_U64: Final = (1 << 64) - 1


def tdx_vcpu_init_mem_region(ops: "TdxOps", vcpu: "Vcpu", cmd: "TdxCmd") -> int:
    """Add the pages of ``struct kvm_tdx_init_mem_region`` at `cmd.data`, one after the other.

    The structure is advanced past the pages that were added, also when a later one fails. Raise ``Errno``.
    Source: `tdx_vcpu_init_mem_region()`, checks in its order.
    """
    mm, td = ops.vm.mm, ops.td
    if not vcpu.vendor.initialized:
        raise Errno(errno.EINVAL)
    if td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)
    if cmd.flags & ~KVM_TDX_MEASURE_MEMORY_REGION:
        raise Errno(errno.EINVAL)
    source, gpa, nr_pages = REGION.unpack(mm.read(cmd.data, REGION.size))
    if source % _PAGE or (source == 0 and _zero_source_is_refused(ops)):
        raise Errno(errno.EINVAL)
    length = nr_pages << 12 & _U64  # the kernel shifts in 64 bits: 2^52 pages are none
    end = gpa + length & _U64
    if gpa % _PAGE or nr_pages == 0 or end <= gpa:
        raise Errno(errno.EINVAL)
    shared_bit = td.gfn_shared_bit << 12
    if gpa & shared_bit or end - 1 & shared_bit:
        raise Errno(errno.EINVAL)

    measure = bool(cmd.flags & KVM_TDX_MEASURE_MEMORY_REGION)
    error: Errno | None = None
    with ops.on_lp(vcpu.vendor.associated_lp) as lp, SourceWindow(ops, source, nr_pages) as window:
        populate = _Populate(ops, vcpu, lp, window, measure=measure)
        while nr_pages:
            try:
                populate.add(source, gpa >> 12)
            except Errno as failure:
                error = failure
                break
            source, gpa, nr_pages = source + _PAGE & _U64, gpa + _PAGE & _U64, nr_pages - 1
    mm.write(cmd.data, REGION.pack(source, gpa, nr_pages))
    if error is not None:
        raise error
    return 0


def _zero_source_is_refused(ops: "TdxOps") -> bool:
    behaves = ops.host.profile.behaves
    return not (behaves("tdx_source_zero_is_ordinary") or behaves("tdx_source_zero_is_eopnotsupp"))


class _Populate:
    """Adds one page after the other (`kvm_gmem_populate()` and `tdx_gmem_post_populate()`)."""

    def __init__(self, ops: "TdxOps", vcpu: "Vcpu", lp: int, window: SourceWindow, *, measure: bool) -> None:
        behaves = ops.host.profile.behaves
        self._ops: Final = ops
        self._vcpu: Final = vcpu
        self._lp: Final = lp
        self._window: Final = window
        self._measure: Final = measure
        self._mirror: Final = mirror_of(ops)
        self._page_first: Final = behaves("tdx_populated_page_is_eexist")
        self._zero_source_fails: Final = behaves("tdx_source_zero_is_eopnotsupp")
        self._busy_is_ebusy: Final = behaves("tdx_page_add_busy_is_ebusy")
        self._error_does_not_bug: Final = behaves("tdx_page_add_error_does_not_bug")

    def add(self, source: int, gfn: int) -> None:
        """Add the page at `source`. Raise ``Errno``, checks in the kernel's order."""
        ops, window = self._ops, self._window
        vm, td = ops.vm, ops.td
        # 1. A pending signal.
        window.check_signals()
        # 2. A slot with guest_memfd.
        slot = vm.find_memslot(gfn)
        if slot is None or not slot.flags & KVM_MEM_GUEST_MEMFD:
            raise Errno(errno.EINVAL)
        # 3. Its file still exists.
        gmem = slot.gmem
        if gmem is None:
            raise Errno(errno.EFAULT)
        index = slot.gmem_index(gfn)
        present = self._mirror.lookup(gfn) >= 0 and gfn not in td.premapped
        if self._page_first:
            page = gmem.get_page(index)
            if index in gmem.prepared:  # whatever the guest has of it: only a hole in the file makes it new again
                raise Errno(errno.EEXIST)
            if not vm.attributes.is_private(gfn):
                raise Errno(errno.EINVAL)
            source_hpa = window.pin(source)
        else:
            # 5. The source page, before anybody looks at the attribute; source 0 may have none.
            no_source = source == 0 and self._zero_source_fails
            source_hpa = 0 if no_source else window.pin(source)
            # 6. The page itself.
            page = gmem.get_page(index)
            # 7. The attribute.
            if not vm.attributes.is_private(gfn):
                raise Errno(errno.EINVAL)
            if no_source:
                raise Errno(errno.EOPNOTSUPP)
        # 8. A page-table root.
        load_root(ops, self._vcpu)
        with td.mmu_lock:
            # 9. Not there yet.
            if present:
                raise Errno(errno.EIO)
            # 10. The SEAMCALLs.
            while not add_tables(ops, self._lp, gfn):
                window.check_signals()
            self._add_page(gfn, page, source_hpa)
        gmem.prepared.add(index)

    def _add_page(self, gfn: int, page: int, source: int) -> None:
        ops = self._ops
        premapped = ops.td.premapped
        while True:
            status = add_page(ops, self._lp, gfn, page, source, measure=self._measure)
            if status == SUCCESS:
                premapped.discard(gfn)
                return
            if is_busy(status):
                if self._busy_is_ebusy:
                    premapped.add(gfn)
                    raise Errno(errno.EBUSY)
                self._window.check_signals()
                continue
            if self._error_does_not_bug:
                premapped.add(gfn)
            else:
                ops.vm.bug()
            raise Errno(errno.EIO)

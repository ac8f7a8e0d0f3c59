"""KVM_TDX_INIT_MEM_REGION of v17: a VM ioctl that borrows the first vCPU."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.mmu.fault import private_page
from sim_backend.kvm.signals import SIGNALS
from sim_backend.kvm.tdx.init_mem_region import KVM_TDX_MEASURE_MEMORY_REGION, REGION
from sim_backend.kvm.tdx.private_memory import add_page, add_tables, mirror_of
from sim_backend.kvm.tdx.root import load_root
from sim_backend.kvm.tdx.seamcalls import SUCCESS, is_busy
from sim_backend.kvm.tdx.source_window import SourceWindow
from sim_backend.kvm.tdx.td import TdState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

_PAGE: Final = 4096
_U64: Final = (1 << 64) - 1
_MAX_PAGES: Final = 1 << 51


def tdx_init_mem_region(ops: "TdxOps", cmd: "TdxCmd") -> int:
    """Add the region's pages. Raise ``Errno``; after at least one page every failure reads EAGAIN."""
    vm, td = ops.vm, ops.td
    if td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)
    if not vm.vcpus:
        raise Errno(errno.EINVAL)
    if cmd.flags & ~KVM_TDX_MEASURE_MEMORY_REGION:
        raise Errno(errno.EINVAL)
    source, gpa, nr_pages = REGION.unpack(vm.mm.read(cmd.data, REGION.size))
    end = gpa + (nr_pages << 12)
    if source % _PAGE or gpa % _PAGE or nr_pages == 0 or nr_pages >= _MAX_PAGES or end > _U64:
        raise Errno(errno.EINVAL)
    shared_bit = td.gfn_shared_bit << 12
    # "Private" needs the S-bit to be known, and the exclusive end is looked at as well.
    if not shared_bit or gpa & shared_bit or end & shared_bit:
        raise Errno(errno.EINVAL)

    vcpu = vm.vcpus[0]
    measure = bool(cmd.flags & KVM_TDX_MEASURE_MEMORY_REGION)
    added = False
    error = 0
    with vcpu.mutex, ops.loaded(vcpu), SourceWindow(ops, source, nr_pages) as window:
        signals = SIGNALS.mark()
        while nr_pages:
            if SIGNALS.since(signals):
                error = errno.EINTR
                break
            try:
                _populate(ops, vcpu, window, source, gpa >> 12, measure=measure)
            except Errno as failure:
                error = failure.errno
                break
            added = True
            source, gpa, nr_pages = source + _PAGE, gpa + _PAGE, nr_pages - 1
    vm.mm.write(cmd.data, REGION.pack(source, gpa, nr_pages))
    if error:
        raise Errno(errno.EAGAIN if added else error)
    return 0


def _populate(ops: "TdxOps", vcpu: "Vcpu", window: SourceWindow, source: int, gfn: int, *, measure: bool) -> None:
    td = ops.td
    source_hpa = window.pin(source)
    try:
        load_root(ops, vcpu)
    except Errno:
        raise Errno(errno.EFAULT) from None
    try:
        page = private_page(vcpu, gfn)  # leaves exit_reason MEMORY_FAULT behind
    except Errno:
        raise Errno(errno.EIO) from None
    with td.mmu_lock:
        if mirror_of(ops).lookup(gfn) >= 0:
            return  # counts as done, and is not measured again
        try:
            while not add_tables(ops, vcpu.lp, gfn):
                pass
            status = add_page(ops, vcpu.lp, gfn, page, source_hpa, measure=measure)
            while is_busy(status):
                status = add_page(ops, vcpu.lp, gfn, page, source_hpa, measure=measure)
        except Errno:
            raise Errno(errno.EFAULT) from None
        if status != SUCCESS:
            ops.vm.bug()
            raise Errno(errno.EFAULT)

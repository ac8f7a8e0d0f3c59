"""A TD's life in the module: creation to the last reclaimed page (`__tdx_td_init()`, `tdx_mmu_release_hkid()`)."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.mmu.mirror_ept import MirrorEpt
from sim_backend.kvm.tdx.seamcalls import (
    FLUSHVP_NOT_DONE,
    INTERRUPTED_RESUMABLE,
    KEY_GENERATION_FAILED,
    NO_HKID_READY_TO_WBCACHE,
    OPERAND_INVALID,
    RND_NO_ENTROPY,
    STATUS_MASK,
    SUCCESS,
    VCPU_NOT_ASSOCIATED,
)
from sim_backend.kvm.tdx.td_params import TdParams

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

MNG_RD_TSC_OFFSET: Final = 0x1110_0003_0000_000A
MNG_RD_TSC_MULTIPLIER: Final = 0x1110_0003_0000_000B


def create_td(ops: "TdxOps", params: TdParams) -> int:
    """Take a key id and issue MNG.CREATE, KEY.CONFIG on every package, ADDCX for every page, MNG.INIT.

    Return the ioctl's result: 0, but in v17 the key id, a positive number, when memory ran out.

    Raise ``Errno``: ENOSPC (no key id), EBUSY (more of them than the control group may have), ENOMEM, EIO, EAGAIN
    (no entropy), EINVAL with the module's status when it refuses the parameters. Whatever was taken is given back
    first.
    """
    td, host = ops.td, ops.host
    hkid = host.hkids.alloc()
    if hkid is None:
        raise Errno(errno.ENOSPC)
    td.hkid = hkid
    if (
        host.misc_cg_max is not None
        and not host.is_v17
        and sum(1 for ops in host.tds if ops.td.hkid) > host.misc_cg_max
    ):
        _abandon(ops, [])
        raise Errno(errno.EBUSY)
    try:
        pages = host.pages.alloc_many(1 + host.sysinfo.tdcs_pages)
    except OutOfMemory:
        _abandon(ops, [])
        if host.is_v17:
            return hkid  # the error path forgets to set its return value
        raise Errno(errno.ENOMEM) from None
    packages = host.package_lps()
    if -1 in packages:
        _abandon(ops, pages)
        raise Errno(errno.EIO)

    with ops.on_lp() as lp:
        tdr = pages[0]
        status = host.seamcalls.mng_create(lp, tdr, hkid)
        if status != SUCCESS:
            error = _creation_failed(ops, status)
            _abandon(ops, pages)
            raise error
        td.tdr = tdr
        try:
            _configure(ops, lp, packages, pages, params)
        except Errno:
            unused = [page for page in pages[1:] if page not in td.tdcs]
            release_hkid(ops)
            reclaim_td(ops)
            for page in unused:
                host.pages.free(page)
            raise
    td.attributes, td.xfam = params.attributes, params.xfam
    td.ept_levels = params.ept_levels
    td.gfn_shared_bit = 1 << (51 if params.gpaw52 else 47) - 12
    td.mirror = MirrorEpt(params.ept_levels)
    return 0


def _configure(ops: "TdxOps", lp: int, packages: list[int], pages: list[int], params: TdParams) -> None:
    td, host = ops.td, ops.host
    calls = host.seamcalls
    for package_lp in packages:
        status = calls.mng_key_config(package_lp, td.tdr)
        while host.is_v17 and status & STATUS_MASK == KEY_GENERATION_FAILED:
            status = calls.mng_key_config(package_lp, td.tdr)
        if status != SUCCESS:
            ops.bug_unless_v17()
            raise Errno(errno.EIO)
    for page in pages[1:]:
        status = calls.mng_addcx(lp, td.tdr, page)
        if status != SUCCESS:
            raise _creation_failed(ops, status)
        td.tdcs.append(page)
    try:
        buffer = host.pages.alloc_zeroed()
    except OutOfMemory:
        raise Errno(errno.ENOMEM) from None
    host.memory.write(buffer, params.pack())
    status = calls.mng_init(lp, td.tdr, buffer)
    host.pages.free(buffer)
    if status & STATUS_MASK == OPERAND_INVALID:
        raise Errno(errno.EINVAL, status)
    if status != SUCCESS:
        ops.bug_unless_v17()
        raise Errno(errno.EIO)


def _creation_failed(ops: "TdxOps", status: int) -> Errno:
    if status == RND_NO_ENTROPY and not ops.host.is_v17:
        return Errno(errno.EAGAIN)
    ops.bug_unless_v17()
    return Errno(errno.EIO)


def _abandon(ops: "TdxOps", pages: list[int]) -> None:
    """Give back a key id and pages that the module never saw."""
    for page in pages:
        ops.host.pages.free(page)
    ops.host.hkids.free(ops.td.hkid)
    ops.td.hkid = 0


def flush_vcpu(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Take `vcpu` off the LP that the module has it on (TDH.VP.FLUSH); nothing to do when it is on none."""
    vendor = vcpu.vendor
    lp = vendor.associated_lp
    if lp < 0:
        return
    vendor.associated_lp = -1
    if not vendor.initialized:
        return
    status = ops.host.seamcalls.vp_flush(lp, vendor.tdvpr)
    if status not in (SUCCESS, VCPU_NOT_ASSOCIATED):
        ops.vm.bug()


def release_hkid(ops: "TdxOps") -> None:
    """Make the module let go of the TD's key id; when it will not, the id is leaked with every page of the TD."""
    td, host = ops.td, ops.host
    if td.hkid == 0:
        return
    calls = host.seamcalls
    with ops.on_lp() as lp:
        for vcpu in ops.vm.vcpus:
            flush_vcpu(ops, vcpu)
        status = calls.mng_vpflushdone(lp, td.tdr)
        while host.is_v17 and status & STATUS_MASK == FLUSHVP_NOT_DONE:
            status = calls.mng_vpflushdone(lp, td.tdr)
        if status != SUCCESS:
            _leak_hkid(ops)
            return
        for package_lp in host.package_lps():
            if package_lp < 0:
                continue
            status = calls.phymem_cache_wb(package_lp, resume=False)
            while status & STATUS_MASK == INTERRUPTED_RESUMABLE:
                status = calls.phymem_cache_wb(package_lp, resume=True)
            if status not in (SUCCESS, NO_HKID_READY_TO_WBCACHE):
                break  # only a warning; KEY.FREEID will say WBCACHE_NOT_COMPLETE
        if calls.mng_key_freeid(lp, td.tdr) != SUCCESS:
            _leak_hkid(ops)
            return
    host.hkids.free(td.hkid)
    td.hkid = 0


def _leak_hkid(ops: "TdxOps") -> None:
    """Give up the key id, and with it every page that the module holds for this TD."""
    td, leak = ops.td, ops.host.pages.leak
    ops.host.hkids.leak(td.hkid)
    for page in (td.tdr, *td.tdcs):
        leak(page)
    for vcpu in ops.vm.vcpus:
        for page in (vcpu.vendor.tdvpr, *vcpu.vendor.tdcx):
            if page:
                leak(page)
    if td.mirror is not None:
        for tables in td.mirror.tables:
            for page in tables.values():
                leak(page)
    if not ops.host.is_v17:
        ops.vm.bug()


def reclaim_page(ops: "TdxOps", lp: int, page: int) -> bool:
    """Take a control page back and free it; on failure it stays the module's, leaked."""
    if ops.host.seamcalls.phymem_page_reclaim(lp, page) != SUCCESS:
        ops.vm.bug()
        ops.host.pages.leak(page)
        return False
    ops.host.pages.free(page)
    return True


def reclaim_vcpu(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Take the pages of `vcpu` back: TDCX pages, then the TDVPR."""
    vendor, td = vcpu.vendor, ops.td
    if td.hkid:
        return  # leaked with the key id
    with ops.on_lp() as lp:
        for page in vendor.tdcx:
            reclaim_page(ops, lp, page)
        vendor.tdcx.clear()
        if vendor.tdvpr:
            reclaim_page(ops, lp, vendor.tdvpr)
            vendor.tdvpr = 0


def reclaim_td(ops: "TdxOps") -> None:
    """Take the Secure-EPT pages, the TDCS pages and last the TDR back."""
    td, host = ops.td, ops.host
    if td.hkid or td.tdr == 0:
        return
    with ops.on_lp() as lp:
        if td.mirror is not None:
            for page in td.mirror.drop_tables():
                reclaim_page(ops, lp, page)
        for page in td.tdcs:
            reclaim_page(ops, lp, page)
        td.tdcs.clear()
        if host.seamcalls.phymem_page_reclaim(lp, td.tdr) != SUCCESS:
            ops.vm.bug()
            host.pages.leak(td.tdr)
            return
        # The TDR was encrypted with the global key; its cache lines must go before the page is reused.
        if host.seamcalls.phymem_page_wbinvd(lp, host.keyed(td.tdr, host.key_ids.global_hkid)) != SUCCESS:
            ops.vm.bug()
            return
        host.pages.free(td.tdr)
        td.tdr = 0

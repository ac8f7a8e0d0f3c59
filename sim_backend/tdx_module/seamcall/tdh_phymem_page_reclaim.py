"""TDH.PHYMEM.PAGE.RECLAIM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_TDR: Final = int(PageType.TDR)
_TDVPR: Final = int(PageType.TDVPR)
_RSVD: Final = int(PageType.RSVD)


def tdh_phymem_page_reclaim(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Take a page back from a TD that is torn down. The contents stay: the host must scrub them.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the page
    RCX     out page type
    RDX     out HPA of the owner's TDR page, 0 for a TDR
    R8      out page size: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB
    R9-R11  out 0
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.PHYMEM.PAGE.RECLAIM.
    """
    hpa = regs[RCX]
    regs[RCX] = regs[RDX] = regs[R8] = regs[R9] = regs[R10] = regs[R11] = 0
    pamt = module.pamt

    # 1. RCX is a page of a TDMR that this LP can lock exclusively.
    entry, level = pamt.walk(hpa, Operand.RCX, 1)

    # 2. Somebody owns it.
    word = module.q[entry]
    page_type = word >> 16 & 0xFF
    if page_type <= _RSVD:
        raise LeafError(Status.PAGE_METADATA_INCORRECT, Operand.RCX)
    owner = word >> 24 << 12
    regs[RCX], regs[RDX], regs[R8] = page_type, owner, level

    # 3. RCX is the first 4 KiB of it.
    if hpa & ((4096 << 9 * level) - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 4. Its TD is torn down; a TDR goes last.
    if page_type != _TDR:
        pamt.lock_entry(pamt.entry_4k(owner), Operand.TDR, 0)
        tdr = module.tdrs[owner]
        if tdr.lifecycle_state != LifecycleState.TEARDOWN:
            raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
    else:
        tdr = module.tdrs[hpa]
        if tdr.lifecycle_state != LifecycleState.TEARDOWN:
            raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
        if tdr.chldcnt:
            raise LeafError(Status.TD_ASSOCIATED_PAGES_EXIST)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if page_type == _TDR:
        del module.tdrs[hpa]
    else:
        tdr.chldcnt -= 1 << 9 * level
        if page_type == _TDVPR:
            module.forget_vcpu(hpa)
    pamt.set_page_type(entry, PageType.NDA)
    return 0

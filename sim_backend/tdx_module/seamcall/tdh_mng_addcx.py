"""TDH.MNG.ADDCX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept_states import FREE_ENTRY
from sim_backend.tdx_module.tdcs import MAX_TDCS_PAGES, MIN_TDCS_PAGES, MSR_BITMAP_PAGE, ROOT_SEPT_PAGE
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MNG_ADDCX]
_INITIAL_CONTENTS: Final = {
    MSR_BITMAP_PAGE: b"\xff" * 4096,
    ROOT_SEPT_PAGE: FREE_ENTRY.to_bytes(8, "little") * 512,
}
"""What a new TDCS page is filled with where it is not zeros."""


def tdh_mng_addcx(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Give a TD one more page for its TDCS.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page
    RDX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.ADDCX.
    """
    hpa, tdr_hpa = regs[RCX], regs[RDX]

    # 1. RDX is a TDR page that this LP can lock exclusively, of a TD that has its key.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX, 1)
    if tdr.fatal:
        raise LeafError(Status.TD_FATAL)
    if tdr.lifecycle_state != LifecycleState.KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)

    # 2. The TDCS can grow.
    index = tdr.num_tdcx
    if index >= MAX_TDCS_PAGES:
        raise LeafError(Status.TDCX_NUM_INCORRECT)

    # 3. RCX is a free page that this LP can lock exclusively.
    entry = module.pamt.lock(hpa, PageType.NDA, Operand.RCX, 1)

    # 4. With the last mandatory page comes a migration key; a page beyond needs a TD that is not initialised yet.
    if index + 1 == MIN_TDCS_PAGES:
        tdr.tdcs.mig_enc_key = module.random_256()
    elif index >= MIN_TDCS_PAGES and not _ALLOWED >> tdr.tdcs.op_state & 1:
        raise LeafError(Status.OP_STATE_INCORRECT)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    contents = _INITIAL_CONTENTS.get(index)
    if contents is None:
        module.memory.zero_page(hpa)
    else:
        module.memory.write(hpa, contents)
    tdr.tdcx_pa.append(hpa)
    tdr.num_tdcx = index + 1
    tdr.chldcnt += 1
    module.pamt.set_page(entry, PageType.TDCX, tdr_hpa)
    return 0

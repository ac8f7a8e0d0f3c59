"""TDH.MIG.STREAM.CREATE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.tdcs import MIGSC_LINKS_PAGE
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MIG_STREAM_CREATE]
_MAX_MIGS: Final = 512


def tdh_mig_stream_create(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Give a TD one more migration stream.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page for the stream's context
    RDX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MIG.STREAM.CREATE.
    """
    hpa, tdr_hpa = regs[RCX], regs[RDX]

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state, locked exclusively.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td_exclusive(tdr, _ALLOWED)

    # 2. There is room for one more.
    tdcs = tdr.tdcs
    index = tdcs.num_migs
    if index >= _MAX_MIGS:
        raise LeafError(Status.MAX_MIGS_NUM_EXCEEDED)

    # 3. RCX is a free page that this LP can lock exclusively.
    entry = module.pamt.lock(hpa, PageType.NDA, Operand.RCX, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.memory.zero_page(hpa)
    module.q[hpa >> 3] = index
    tdr.chldcnt += 1
    module.pamt.set_page(entry, PageType.TDCX, tdr_hpa)
    module.q[(tdr.tdcx_pa[MIGSC_LINKS_PAGE] >> 3) + index] = hpa
    tdcs.num_migs = index + 1
    return 0

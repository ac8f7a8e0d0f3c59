"""TDH.VP.CREATE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.tdvps import Tdvps
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_CREATE]


def tdh_vp_create(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Make a page the TDVPR of a new vCPU.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page
    RDX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.VP.CREATE.
    """
    hpa, tdr_hpa = regs[RCX], regs[RDX]

    # 1. RDX is a TDR page that this LP can lock shared, of a TD that takes new vCPUs.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _ALLOWED)

    # 2. RCX is a free page that this LP can lock exclusively.
    entry = module.pamt.lock(hpa, PageType.NDA, Operand.RCX, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.memory.zero_page(hpa)
    module.tdvpses[hpa] = Tdvps(hpa, tdr, module.pamt.path(hpa, tdr_hpa))
    tdr.chldcnt += 1
    module.pamt.set_page(entry, PageType.TDVPR, tdr_hpa)
    return 0

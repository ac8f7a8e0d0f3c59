"""TDH.PHYMEM.PAGE.WBINVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.pamt import PageType
from uapi_ctypes.tdx_status import Operand

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_phymem_page_wbinvd(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Write back and invalidate the cache lines of a free page; no cache is modelled, only the checks are.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page, with the HKID whose lines are meant
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.PHYMEM.PAGE.WBINVD.
    """
    # 1. RCX without its HKID is a free page that this LP can lock shared.
    module.pamt.lock(regs[RCX] & ~module.hkid_mask, PageType.NDA, Operand.RCX, 0)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    return 0

"""TDH.VP.ADDCX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.tdvps import (
    MAX_TDVPS_PAGES,
    MIN_TDVPS_PAGES,
    TDVPS_PAGES_PER_L2_VM,
    VcpuState,
)
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_ADDCX]
_L2_MSR_BITMAPS: Final = frozenset(range(MIN_TDVPS_PAGES + 1, MAX_TDVPS_PAGES, TDVPS_PAGES_PER_L2_VM))
"""The second page of each L2 VM: all MSRs intercepted until the L1 guest says otherwise."""


def tdh_vp_addcx(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Give a vCPU one more page for its TDVPS.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page
    RDX     in  HPA of the TDVPR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.VP.ADDCX.
    """
    hpa, tdvpr_hpa = regs[RCX], regs[RDX]

    # 1. RDX is a TDVPR page that this LP can lock exclusively, of a TD that takes new vCPUs.
    tdvps = module.lock_tdvpr(tdvpr_hpa, Operand.RDX, 1)
    tdr = tdvps.tdr
    module.check_td(tdr, _ALLOWED)

    # 2. The vCPU is not initialised, and can grow.
    if tdvps.vcpu_state != VcpuState.UNINITIALIZED:
        raise LeafError(Status.VCPU_STATE_INCORRECT)
    if tdvps.num_tdvps_pages >= MAX_TDVPS_PAGES:
        raise LeafError(Status.TDCX_NUM_INCORRECT)

    # 3. RCX is a free page that this LP can lock exclusively.
    entry = module.pamt.lock(hpa, PageType.NDA, Operand.RCX, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if tdvps.num_tdvps_pages in _L2_MSR_BITMAPS:
        module.memory.write(hpa, b"\xff" * 4096)
    else:
        module.memory.zero_page(hpa)
    tdvps.tdvps_page_pa.append(hpa)
    tdvps.num_tdvps_pages += 1
    tdr.chldcnt += 1
    module.pamt.set_page(entry, PageType.TDCX, tdr.hpa)
    return 0

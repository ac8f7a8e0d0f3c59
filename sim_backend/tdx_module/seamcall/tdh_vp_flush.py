"""TDH.VP.FLUSH."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.tdr import LifecycleState
from sim_backend.tdx_module.tdvps import NO_LP, needed_tdvps_pages
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_vp_flush(module: TdxModule, lp: int, regs: Gprs) -> int:
    """End a vCPU's association with this LP: flush what the LP caches of it.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDVPR page
    ======= === ============================================================

    A vCPU of a TD in the FATAL state is flushed like any other.

    Spec: TDX Module ABI Reference, TDH.VP.FLUSH.
    """
    # 1. RCX is a TDVPR page that this LP can lock exclusively, of a TD that has its key.
    tdvps = module.lock_tdvpr(regs[RCX], Operand.RCX, 1)
    tdr = tdvps.tdr
    if tdr.lifecycle_state != LifecycleState.KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)

    # 2. The TDVPS is complete.
    if tdvps.num_tdvps_pages < needed_tdvps_pages(tdr.tdcs.num_l2_vms):
        raise LeafError(Status.TDCX_NUM_INCORRECT)

    # 3. The vCPU is associated with this LP.
    if tdvps.assoc_lpid != lp:
        raise LeafError(Status.VCPU_NOT_ASSOCIATED)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if tdvps.cpu is not None:
        tdvps.cpu.invalidate()
    tdvps.assoc_lpid = NO_LP
    tdr.tdcs.num_assoc_vcpus -= 1
    return 0

"""TDH.MNG.KEY.FREEID."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_mng_key_freeid(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Free the TD's HKID, after every package has written its caches back.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.KEY.FREEID.
    """
    # 1. RCX is a TDR page that this LP can lock exclusively, of a blocked TD.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX, 1)
    if tdr.lifecycle_state != LifecycleState.BLOCKED:
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)

    # 2. The KOT can be locked, and no package owes a write-back.
    if not module.kot.lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.KOT)
    if module.kot.wbinvd_bitmap[tdr.hkid]:
        raise LeafError(Status.WBCACHE_NOT_COMPLETE)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.kot.state[tdr.hkid] = HkidState.FREE
    tdr.lifecycle_state = LifecycleState.TEARDOWN
    return 0

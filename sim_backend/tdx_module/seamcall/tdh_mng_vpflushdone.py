"""TDH.MNG.VPFLUSHDONE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.tdcs import MIN_TDCS_PAGES
from sim_backend.tdx_module.tdr import TRANSITIONS, LifecycleState
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_LEAF: Final = SeamcallLeaf.TDH_MNG_VPFLUSHDONE


def tdh_mng_vpflushdone(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Declare that no LP holds a vCPU of the TD any more, and block its HKID.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    ======= === ============================================================

    A TD in the FATAL state is torn down like any other.

    Spec: TDX Module ABI Reference, TDH.MNG.VPFLUSHDONE.
    """
    # 1. RCX is a TDR page that this LP can lock exclusively.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX, 1)

    # 2. The KOT can be locked.
    if not module.kot.lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.KOT)

    # 3. The TD still has its HKID.
    new_state = TRANSITIONS.get((LifecycleState(tdr.lifecycle_state), _LEAF))
    if new_state is None:
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)

    # 4. No vCPU is associated with an LP.
    tdcs = tdr.tdcs
    if tdr.num_tdcx >= MIN_TDCS_PAGES and tdcs.op_state != OpState.UNINITIALIZED and tdcs.num_assoc_vcpus:
        raise LeafError(Status.FLUSHVP_NOT_DONE)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.kot.wbinvd_bitmap[tdr.hkid] = module.pkg_config_bitmap
    module.kot.state[tdr.hkid] = HkidState.FLUSHED
    tdr.lifecycle_state = new_state
    return 0

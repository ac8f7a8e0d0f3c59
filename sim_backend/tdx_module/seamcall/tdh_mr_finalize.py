"""TDH.MR.FINALIZE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED, OpState
from sim_backend.tdx_module.tdcs import MRTD_OFFSET
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MR_FINALIZE]


def tdh_mr_finalize(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """End the building of a TD: MRTD is final and vCPUs may run.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MR.FINALIZE.
    """
    # 1. RCX is a TDR page that this LP can lock exclusively, of a TD that is being built.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX, 1)
    module.check_td_locked(tdr, _ALLOWED)
    tdcs = tdr.tdcs

    # 2. It has an initialised vCPU.
    if not tdcs.num_vcpus:
        raise LeafError(Status.NO_VCPUS)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdcs.mrtd = tdcs.measurement.digest()
    module.memory.write(tdr.tdcx_pa[0] + MRTD_OFFSET, tdcs.mrtd)
    tdcs.servtd_hash = tdcs.service_td_hash()
    tdcs.op_state = OpState.RUNNABLE
    return 0

"""TDH.MEM.TRACK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MEM_TRACK]


def tdh_mem_track(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Begin a new TLB epoch: once every vCPU has exited, nobody uses translations from before.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.TRACK.
    """
    # 1. RCX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX)
    module.check_td(tdr, _ALLOWED)
    tdcs = tdr.tdcs

    # 2. The epoch can be locked.
    if not tdcs.epoch_lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.TD_EPOCH)

    # 3. No vCPU runs that entered in the epoch before this one.
    if tdcs.refcount[1 - (tdcs.td_epoch & 1)]:
        raise LeafError(Status.PREVIOUS_TLB_EPOCH_BUSY)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdcs.td_epoch += 1
    return 0

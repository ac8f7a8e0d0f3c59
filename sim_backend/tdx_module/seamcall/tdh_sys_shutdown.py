"""TDH.SYS.SHUTDOWN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_shutdown(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Shut the module down, so that another release can take over its TDs; no other release is modelled.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  handoff version that the successor understands
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.SHUTDOWN.
    """
    # 1. The module can hand over in that version.
    if not module.profile.min_update_hv <= regs[RCX] <= module.profile.module_hv:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 2. No other LP is in the module, or in a TD.
    if not module.global_lock.try_exclusive():
        raise LeafError(Status.SYS_BUSY)
    if any(tdvps is not None and other != lp for other, tdvps in enumerate(module.running)):
        raise LeafError(Status.SYS_BUSY)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.sys_state = SysState.SYS_SHUTDOWN
    return 0

"""TDH.SYS.UPDATE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_update(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Take over the TDs of a module that was shut down. No operands.

    The model's module is always the first one loaded, so there is never anything to take over.

    Spec: TDX Module ABI Reference, TDH.SYS.UPDATE.
    """
    # 1. The module is initialised on every LP, and not configured.
    if not module.global_lock.try_exclusive():
        raise LeafError(Status.SYS_BUSY)
    if module.sys_state != SysState.SYSINIT_DONE or not all(module.lp_is_init):
        raise LeafError(Status.SYS_STATE_INCORRECT)

    # 2. A predecessor left handoff data.
    raise LeafError(Status.SYS_INVALID_HANDOFF)

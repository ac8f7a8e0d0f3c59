"""TDH.SYS.LP.SHUTDOWN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import Gprs

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_lp_shutdown(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Succeed without doing anything: the leaf is deprecated, but older hosts still call it.

    Spec: TDX Module ABI Reference, TDH.SYS.LP.SHUTDOWN.
    """
    return 0

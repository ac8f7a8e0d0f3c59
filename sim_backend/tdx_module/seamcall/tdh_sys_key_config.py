"""TDH.SYS.KEY.CONFIG."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_key_config(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Program the module's own key on this LP's package. No operands; on the last package the module is ready.

    Spec: TDX Module ABI Reference, TDH.SYS.KEY.CONFIG.
    """
    # 1. The module is configured and waits for keys.
    if not module.global_lock.try_exclusive():
        raise LeafError(Status.SYS_BUSY)
    if module.sys_state != SysState.SYSCONFIG_DONE:
        raise LeafError(Status.SYS_KEY_CONFIG_NOT_PENDING)

    # 2. This package does not have the key yet.
    package = 1 << module.platform.lps[lp].package
    if module.pkg_config_bitmap & package:
        raise LeafError(Status.KEY_CONFIGURED)

    # 3. PCONFIG programs it.
    module.program_key()

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.pkg_config_bitmap |= package
    if module.pkg_config_bitmap.bit_count() == module.platform.packages:
        module.sys_state = SysState.SYS_READY
    return 0

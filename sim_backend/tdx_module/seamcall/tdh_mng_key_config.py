"""TDH.MNG.KEY.CONFIG."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_mng_key_config(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Program the TD's encryption key on this LP's package.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.KEY.CONFIG.
    """
    # 1. RCX is a TDR page that this LP can lock exclusively, of a TD that waits for its key.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX, 1)
    if tdr.fatal:
        raise LeafError(Status.TD_FATAL)
    if tdr.lifecycle_state != LifecycleState.HKID_ASSIGNED:
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)

    # 2. This package does not have the key yet.
    package = 1 << module.platform.lps[lp].package
    if tdr.pkg_config_bitmap & package:
        raise LeafError(Status.KEY_CONFIGURED)

    # 3. PCONFIG programs it.
    module.program_key()

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdr.pkg_config_bitmap |= package
    if tdr.pkg_config_bitmap == module.pkg_config_bitmap:
        tdr.lifecycle_state = LifecycleState.KEYS_CONFIGURED
    return 0

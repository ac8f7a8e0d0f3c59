"""TDH.IMPORT.STATE.IMMUTABLE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.migration import MIN_MIGS, check_stream
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.seamcall.tdh_mng_init import IA32_MISC_ENABLE, MISC_ENABLE_BOOT_NT4
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_IMPORT_STATE_IMMUTABLE]


def tdh_import_state_immutable(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Start an import session. Only the checks are modelled.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    R8      in  HPA and size of the MBMD
    R9      in  HPA and last entry of a page list
    R10     in  stream index 0; bit 63: go on after an interrupt
    RCX,RDX out extended error information; 0
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.IMPORT.STATE.IMMUTABLE.
    """
    tdr_hpa = regs[RCX]
    regs[RCX] = regs[RDX] = 0

    # 1. CPUID is not limited for the sake of old operating systems.
    if module.platform.rdmsr(lp, IA32_MISC_ENABLE) & MISC_ENABLE_BOOT_NT4:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)

    # 2. RCX is a TDR page that this LP can lock exclusively, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RCX, 1)
    module.check_td_locked(tdr, _ALLOWED)

    # 3. The TD has its streams; R10 is valid; there is nothing to go on with.
    tdcs = tdr.tdcs
    if tdcs.num_migs < MIN_MIGS:
        raise LeafError(Status.MIN_MIGS_NOT_CREATED)
    if check_stream(regs[R10]):
        raise LeafError(Status.MIGRATION_STREAM_STATE_INCORRECT)

    # 4. A migration TD has written the key.
    if not tdcs.mig_dec_key_set:
        raise LeafError(Status.MIGRATION_DECRYPTION_KEY_NOT_SET)
    raise NotModelled("TDH_IMPORT_STATE_IMMUTABLE: a migration session")

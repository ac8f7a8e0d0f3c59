"""TDH.EXPORT.STATE.IMMUTABLE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.migration import MIN_MIGS, check_mbmd, check_page_list, check_stream
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.td_params import ATTR_MIGRATABLE
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_EXPORT_STATE_IMMUTABLE]
_MIN_PAGES: Final = 3


def tdh_export_state_immutable(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Start an export session. Only the checks are modelled.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    R8      in  HPA and size of the MBMD buffer
    R9      in  HPA and last entry of a page list
    R10     in  stream index 0; bit 63: go on after an interrupt
    RDX     out pages used; 0 on an error
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.EXPORT.STATE.IMMUTABLE.
    """
    regs[RDX] = 0

    # 1. RCX is a TDR page that this LP can lock shared, of a TD in a suitable state, locked exclusively.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX)
    module.check_td_exclusive(tdr, _ALLOWED)

    # 2. The TD can migrate and has its streams.
    tdcs = tdr.tdcs
    if not tdcs.attributes & ATTR_MIGRATABLE:
        raise LeafError(Status.TD_NOT_MIGRATABLE)
    if tdcs.mig_count:
        raise LeafError(Status.PREVIOUS_EXPORT_CLEANUP_INCOMPLETE)
    if tdcs.num_migs < MIN_MIGS:
        raise LeafError(Status.MIN_MIGS_NOT_CREATED)

    # 3. R8, R10 and R9 are valid; there is nothing to go on with.
    check_mbmd(module, regs[R8])
    if check_stream(regs[R10]):
        raise LeafError(Status.MIGRATION_STREAM_STATE_INCORRECT)
    check_page_list(module, regs[R9], _MIN_PAGES)

    # 4. A migration TD has written the key.
    if not tdcs.mig_dec_key_set:
        raise LeafError(Status.MIGRATION_DECRYPTION_KEY_NOT_SET)
    raise NotModelled("TDH_EXPORT_STATE_IMMUTABLE: a migration session")

"""TDG.SERVTD.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from sim_backend.tdx_module.op_states import ALLOWED_TDCALL
from sim_backend.tdx_module.servtd_metadata import target_td
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_ALLOWED: Final = ALLOWED_TDCALL[TdcallLeaf.TDG_SERVTD_RD]


def tdg_servtd_rd(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Read a TD-scope metadata field of a TD that this service TD is bound to.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  binding handle
    RDX     in  field id; all ones asks for the first
    R10-R13 in  TD_UUID of the target; out: the new one with TARGET_UUID_UPDATED
    RDX     out next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.SERVTD.RD.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    field_id = metadata.with_context(gprs[RDX], Context.TD)
    gprs[RDX] = NULL_FIELD_ID
    gprs[R8] = 0
    target = target_td(module, lp, regs, tdvps, _ALLOWED)
    if metadata.is_null_field_id(field_id):
        gprs[RDX] = metadata_td.next_element(target, field_id, Access.MIGTD)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    gprs[R8] = metadata_td.read_element(module, target, field_id, Access.MIGTD)
    gprs[RDX] = metadata_td.next_element(target, field_id, Access.MIGTD)
    return 0

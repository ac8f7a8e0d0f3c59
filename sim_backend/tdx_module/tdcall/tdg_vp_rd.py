"""TDG.VP.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_vp
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_rd(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Read a vCPU-scope metadata field of the calling vCPU.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  0
    RDX     in  field id; all ones asks for the first
    RDX     out next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.RD.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    field_id = metadata.with_context(gprs[RDX], Context.VP)
    gprs[R8] = 0
    gprs[RDX] = NULL_FIELD_ID
    if gprs[RCX]:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if metadata.is_null_field_id(field_id):
        gprs[RDX] = metadata_vp.next_element(tdvps, field_id, Access.GUEST)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    gprs[R8] = metadata_vp.read_element(module, tdvps, field_id, Access.GUEST)
    gprs[RDX] = metadata_vp.next_element(tdvps, field_id, Access.GUEST)
    return 0

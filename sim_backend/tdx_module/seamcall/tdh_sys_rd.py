"""TDH.SYS.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_sys
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_rd(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Read a metadata field of the TDX module.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RDX     in  field id; all ones asks for the first
    RDX     out next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.RD.
    """
    field_id = metadata.with_context(regs[RDX], Context.SYS)
    regs[RDX] = NULL_FIELD_ID
    regs[R8] = 0
    if not module.lp_is_init[lp]:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)
    if metadata.is_null_field_id(field_id):
        regs[RDX] = metadata.next_element(Context.SYS, field_id, Access.HOST)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    regs[R8] = metadata_sys.read_element(module, field_id, Access.HOST)
    regs[RDX] = metadata.next_element(Context.SYS, field_id, Access.HOST)
    return 0

"""TDH.MNG.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Context
from sim_backend.tdx_module.op_states import ALLOWED
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MNG_RD]


def tdh_mng_rd(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Read a TD-scope metadata field.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    RDX     in  field id; version 1: all ones asks for the first
    RDX     out version 1: next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.RD.
    """
    version = regs[RAX] >> 16
    field_id = metadata.with_context(regs[RDX], Context.TD)
    regs[R8] = 0
    if version:
        regs[RDX] = NULL_FIELD_ID
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)

    # 1. RCX is a TDR page, of a TD that is initialised.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX)
    module.check_td(tdr, _ALLOWED)

    # 2. RDX is a field that the host may read.
    access = metadata_td.host_access(tdr)
    if version and metadata.is_null_field_id(field_id):
        regs[RDX] = metadata_td.next_element(tdr, field_id, access)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    regs[R8] = metadata_td.read_element(module, tdr, field_id, access)
    if version:
        regs[RDX] = metadata_td.next_element(tdr, field_id, access)
    return 0

"""TDH.VP.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_vp
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Context
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.tdvps import needed_tdvps_pages
from sim_backend.tdx_module.vcpu_association import associate
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_RD]


def tdh_vp_rd(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Read a vCPU-scope metadata field; the vCPU becomes associated with this LP.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDVPR page
    RDX     in  field id; version 1: all ones asks for the first
    RDX     out version 1: next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.VP.RD.
    """
    version = regs[RAX] >> 16
    field_id = metadata.with_context(regs[RDX], Context.VP)
    regs[R8] = 0
    if version:
        regs[RDX] = NULL_FIELD_ID
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)

    # 1. RCX is a TDVPR page, of a TD that is initialised.
    tdvps = module.lock_tdvpr(regs[RCX], Operand.RCX)
    module.check_td(tdvps.tdr, _ALLOWED)

    # 2. The vCPU is complete and does not belong to another LP.
    if tdvps.num_tdvps_pages < needed_tdvps_pages(tdvps.tdr.tdcs.num_l2_vms):
        raise LeafError(Status.TDCX_NUM_INCORRECT)
    associate(tdvps, lp, allow_disabled=True)

    # 3. RDX is a field that the host may read.
    access = metadata_vp.host_access(tdvps.tdr)
    if version and metadata.is_null_field_id(field_id):
        regs[RDX] = metadata_vp.next_element(tdvps, field_id, access)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    regs[R8] = metadata_vp.read_element(module, tdvps, field_id, access)
    if version:
        regs[RDX] = metadata_vp.next_element(tdvps, field_id, access)
    return 0

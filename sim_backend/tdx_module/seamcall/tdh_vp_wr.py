"""TDH.VP.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_vp
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import Context
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.tdvps import needed_tdvps_pages
from sim_backend.tdx_module.vcpu_association import associate
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_WR]


def tdh_vp_wr(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Write bits of a vCPU-scope metadata field; the vCPU becomes associated with this LP.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDVPR page
    RDX     in  field id
    R8      i/o value; out: old value
    R9      in  mask of the bits to write
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.VP.WR.
    """
    value = regs[R8]
    regs[R8] = 0

    # 1. RCX is a TDVPR page, of a TD that is initialised.
    tdvps = module.lock_tdvpr(regs[RCX], Operand.RCX)
    module.check_td(tdvps.tdr, _ALLOWED)

    # 2. The vCPU is complete and does not belong to another LP.
    if tdvps.num_tdvps_pages < needed_tdvps_pages(tdvps.tdr.tdcs.num_l2_vms):
        raise LeafError(Status.TDCX_NUM_INCORRECT)
    associate(tdvps, lp)

    # 3. RDX is a field, R9 bits of it, that the host may write, and R8 a legal value.
    field_id = metadata.with_context(regs[RDX], Context.VP)
    access = metadata_vp.host_access(tdvps.tdr)
    regs[R8] = metadata_vp.write_element(module, tdvps, field_id, access, value, regs[R9])
    return 0

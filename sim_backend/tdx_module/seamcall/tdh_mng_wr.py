"""TDH.MNG.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.metadata import Context
from sim_backend.tdx_module.op_states import ALLOWED
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MNG_WR]


def tdh_mng_wr(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Write bits of a TD-scope metadata field.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    RDX     in  field id
    R8      i/o value; out: old value
    R9      in  mask of the bits to write
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.WR.
    """
    value = regs[R8]
    regs[R8] = 0

    # 1. RCX is a TDR page, of a TD that is initialised.
    tdr = module.lock_tdr(regs[RCX], Operand.RCX)
    module.check_td(tdr, _ALLOWED)

    # 2. RDX is a field, R9 bits of it, that the host may write, and R8 a legal value.
    field_id = metadata.with_context(regs[RDX], Context.TD)
    regs[R8] = metadata_td.write_element(module, tdr, field_id, metadata_td.host_access(tdr), value, regs[R9])
    return 0

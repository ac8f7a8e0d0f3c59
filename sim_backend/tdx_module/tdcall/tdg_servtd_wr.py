"""TDG.SERVTD.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.metadata import Access, Context
from sim_backend.tdx_module.op_states import ALLOWED_TDCALL
from sim_backend.tdx_module.servtd_metadata import target_td
from uapi_ctypes.tdx_leaves import TdcallLeaf

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_ALLOWED: Final = ALLOWED_TDCALL[TdcallLeaf.TDG_SERVTD_WR]


def tdg_servtd_wr(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Write bits of a TD-scope metadata field of a TD that this service TD is bound to.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  binding handle
    RDX     in  field id
    R8      i/o value; out: old value
    R9      in  mask of the bits to write
    R10-R13 in  TD_UUID of the target; out: the new one with TARGET_UUID_UPDATED
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.SERVTD.WR.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    field_id = metadata.with_context(gprs[RDX], Context.TD)
    value = gprs[R8]
    gprs[R8] = 0
    target = target_td(module, lp, regs, tdvps, _ALLOWED)
    gprs[R8] = metadata_td.write_element(module, target, field_id, Access.MIGTD, value, gprs[R9])
    return 0

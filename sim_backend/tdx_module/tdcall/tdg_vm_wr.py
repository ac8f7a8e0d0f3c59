"""TDG.VM.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, R9, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import Access, Context
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vm_wr(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Write bits of a TD-scope metadata field of the guest's own TD.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  VM: 0
    RDX     in  field id
    R8      i/o value; out: old value
    R9      in  mask of the bits to write
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VM.WR.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    value = gprs[R8]
    gprs[R8] = 0
    if gprs[RCX]:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    field_id = metadata.with_context(gprs[RDX], Context.TD)
    gprs[R8] = metadata_td.write_element(module, tdvps.tdr, field_id, Access.GUEST, value, gprs[R9])
    return 0

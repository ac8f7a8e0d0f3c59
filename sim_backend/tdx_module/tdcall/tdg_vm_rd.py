"""TDG.VM.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_td
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vm_rd(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Read a TD-scope metadata field of the guest's own TD.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  VM: 0
    RDX     in  field id; version 1: all ones asks for the first
    RDX     out version 1: next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VM.RD.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    version = gprs[RAX] >> 16
    field_id = metadata.with_context(gprs[RDX], Context.TD)
    gprs[R8] = 0
    if version:
        gprs[RDX] = NULL_FIELD_ID
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    if gprs[RCX]:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if version and metadata.is_null_field_id(field_id):
        gprs[RDX] = metadata_td.next_element(tdvps.tdr, field_id, Access.GUEST)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    gprs[R8] = metadata_td.read_element(module, tdvps.tdr, field_id, Access.GUEST)
    if version:
        gprs[RDX] = metadata_td.next_element(tdvps.tdr, field_id, Access.GUEST)
    return 0

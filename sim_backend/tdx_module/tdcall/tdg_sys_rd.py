"""TDG.SYS.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RDX, Gprs
from sim_backend.tdx_module import metadata, metadata_sys
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_sys_rd(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Read a metadata field of the TDX module.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RDX     in  field id; all ones asks for the first
    RDX     out next field id, all ones at the end or on an error
    R8      out value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.SYS.RD.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    field_id = metadata.with_context(gprs[RDX], Context.SYS)
    gprs[R8] = 0
    gprs[RDX] = NULL_FIELD_ID
    if metadata.is_null_field_id(field_id):
        gprs[RDX] = metadata.next_element(Context.SYS, field_id, Access.GUEST)
        raise LeafError(Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT)
    gprs[R8] = metadata_sys.read_element(module, field_id, Access.GUEST)
    gprs[RDX] = metadata.next_element(Context.SYS, field_id, Access.GUEST)
    return 0

"""TDG.SYS.RDALL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RDX, Gprs
from sim_backend.hw.memory import PAGE_SIZE
from sim_backend.tdx_module import metadata
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import READ_WRITE, translate
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from sim_backend.tdx_module.metadata_list import dump_sys
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_sys_rdall(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Read all metadata fields of the TDX module that a guest may read, as a list.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RDX     in  GPA of the page for the list, private, 4 KiB-aligned
    R8      in  id of the first field; all ones: from the beginning
    R8      out id of the next field, all ones at the end or on an error
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.SYS.RDALL.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    start = metadata.with_context(gprs[R8], Context.SYS)
    gprs[R8] = NULL_FIELD_ID
    if gprs[RDX] & (PAGE_SIZE - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    hpa = translate(module, lp, regs, tdvps, gprs[RDX], READ_WRITE, Operand.RDX, private_only=True)
    data, gprs[R8], status = dump_sys(module, start, Access.GUEST, PAGE_SIZE)
    module.memory.write(hpa, data)
    return status

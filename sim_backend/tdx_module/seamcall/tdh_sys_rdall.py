"""TDH.SYS.RDALL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, RDX, Gprs
from sim_backend.hw.memory import PAGE_SIZE
from sim_backend.tdx_module import metadata
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import NULL_FIELD_ID, Access, Context
from sim_backend.tdx_module.metadata_list import dump_sys
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_sys_rdall(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Read all metadata fields of the TDX module that the host may read, as a list.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RDX     in  HPA of the page for the list, shared, 4 KiB-aligned
    R8      in  id of the first field; all ones: from the beginning
    R8      out id of the next field, all ones at the end or on an error
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.RDALL.
    """
    start = metadata.with_context(regs[R8], Context.SYS)
    regs[R8] = NULL_FIELD_ID
    if not module.lp_is_init[lp]:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)
    module.check_shared_hpa(regs[RDX], PAGE_SIZE, Operand.RDX)
    data, regs[R8], status = dump_sys(module, start, Access.HOST, PAGE_SIZE)
    module.write_shared(regs[RDX], data)
    return status

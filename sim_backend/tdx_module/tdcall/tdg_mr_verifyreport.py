"""TDG.MR.VERIFYREPORT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import READ, translate
from sim_backend.tdx_module.metadata_sys import SEAMOPS_SEAMVERIFYREPORT
from sim_backend.tdx_module.tdreport import REPORTMACSTRUCT_BYTES, is_made_here
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_mr_verifyreport(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Verify the MAC of a report made on this platform.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA of the REPORTMACSTRUCT, private, 256-byte-aligned
    ======= === ============================================================

    The CPU (SEAMVERIFYREPORT) accepts a report whose MAC is right under its key (`Platform.report_key`). Its verdict on
    the CPUSVN is not modelled: a report that this CPU made has the right one.

    Spec: TDX Module ABI Reference, TDG.MR.VERIFYREPORT.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gpa = tdvps.cpu.gprs[RCX]
    platform = module.platform

    # 1. The CPU can verify reports; RCX is aligned, and private memory that the guest can read.
    if not platform.seamops_capabilities & SEAMOPS_SEAMVERIFYREPORT:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    if gpa & (REPORTMACSTRUCT_BYTES - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    hpa = translate(module, lp, regs, tdvps, gpa, READ, Operand.RCX, private_only=True)

    # 2. The CPU made the report.
    if not is_made_here(platform.report_key, module.memory.read(hpa, REPORTMACSTRUCT_BYTES)):
        raise LeafError(Status.INVALID_REPORTMACSTRUCT)
    return 0

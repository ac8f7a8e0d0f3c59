"""TDG.MR.REPORT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import READ, READ_WRITE, translate
from sim_backend.tdx_module.locks import GuestTry
from sim_backend.tdx_module.outcome import INTERRUPTED
from sim_backend.tdx_module.tdcall.tdg_mr_rtmr_extend import BUSY_STATUS
from sim_backend.tdx_module.tdreport import REPORTDATA_BYTES, TDREPORT_BYTES, tdreport
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

IA32_INTR_PENDING: Final = 0x9A


def tdg_mr_report(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Write a TDREPORT of the TD and of 64 bytes of the guest's choice.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA for the TDREPORT, 1 KiB-aligned
    RDX     in  GPA of REPORTDATA, 64-byte-aligned
    R8      in  report sub-type: 0
    ======= === ============================================================

    Both may be private or shared. A pending interrupt makes the TDCALL run again.

    Spec: TDX Module ABI Reference, TDG.MR.REPORT.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    tdcs = tdvps.tdr.tdcs

    # 1. RCX and RDX are aligned; the guest can read REPORTDATA; the sub-type is known.
    if gprs[RCX] & (TDREPORT_BYTES - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if gprs[RDX] & (REPORTDATA_BYTES - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    data_hpa = translate(module, lp, regs, tdvps, gprs[RDX], READ, Operand.RDX, private_only=False)
    if gprs[R8]:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)

    # 2. Nobody changes the RTMRs. (TDINFO is hashed here, so an interrupted call has made progress.)
    attempt = tdcs.rtmr_lock.guest_try_shared()
    if attempt != GuestTry.ACQUIRED:
        raise LeafError(BUSY_STATUS[attempt], Operand.RTMR)
    report = tdreport(tdcs, module.memory.read(data_hpa, REPORTDATA_BYTES), module.platform.report_key)
    if module.platform.rdmsr(lp, IA32_INTR_PENDING):
        return INTERRUPTED

    # 3. The guest can write to RCX.
    hpa = translate(module, lp, regs, tdvps, gprs[RCX], READ_WRITE, Operand.RCX, private_only=False)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.memory.write(hpa, report)
    return 0

"""TDG.MR.VERIFYREPORT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import READ, translate
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_REPORTMACSTRUCT_BYTES: Final = 256


def tdg_mr_verifyreport(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Verify the MAC of a report made on this platform.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA of the REPORTMACSTRUCT, private, 256-byte-aligned
    ======= === ============================================================

    The MAC is the CPU's (SEAMVERIFYREPORT) and its key is not modelled: any report is accepted, as by the recorded
    vectors' CPU.

    Spec: TDX Module ABI Reference, TDG.MR.VERIFYREPORT.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gpa = tdvps.cpu.gprs[RCX]
    if gpa & (_REPORTMACSTRUCT_BYTES - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    translate(module, lp, regs, tdvps, gpa, READ, Operand.RCX, private_only=True)
    return 0

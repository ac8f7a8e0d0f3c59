"""TDG.VP.VEINFO.GET."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, R9, R10, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_veinfo_get(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Hand the guest the information of its last #VE, and make room for the next.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     out VMX exit reason
    RDX     out exit qualification
    R8      out guest-linear address
    R9      out GPA
    R10     out instruction length in bits 31:0, instruction information in 63:32
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.VEINFO.GET.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    for register in (RCX, RDX, R8, R9, R10):
        gprs[register] = 0
    ve_info = tdvps.ve_info

    # 1. There was a #VE that the guest has not read yet.
    if not ve_info.valid:
        raise LeafError(Status.NO_VALID_VE_INFO)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    gprs[RCX] = ve_info.exit_reason
    gprs[RDX] = ve_info.exit_qualification
    gprs[R8] = ve_info.gla
    gprs[R9] = ve_info.gpa
    gprs[R10] = ve_info.instruction_length | ve_info.instruction_information << 32
    ve_info.valid = 0
    return 0

"""TDG.VP.CPUIDVE.SET."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_cpuidve_set(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Choose whether every CPUID of the guest ends in a #VE.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  bit 0: at CPL 0; bit 1: at CPL 1 to 3
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.CPUIDVE.SET.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    control = tdvps.cpu.gprs[RCX]
    if control & ~3:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdvps.cpuid_supervisor_ve = control & 1
    tdvps.cpuid_user_ve = control >> 1
    return 0

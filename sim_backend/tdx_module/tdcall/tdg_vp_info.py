"""TDG.VP.INFO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R8, R9, R10, R11, RCX, RDX, Gprs

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_info(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Tell the guest about its TD and itself.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     out GPA width [bits]: 48 or 52
    RDX     out ATTRIBUTES
    R8      out NUM_VCPUS in bits 31:0, MAX_VCPUS in bits 63:32
    R9      out VCPU_INDEX
    R10     out bit 0: TDG.SYS.RD is available
    R11     out 0
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.INFO.
    """
    tdcs = tdvps.tdr.tdcs
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    gprs[RCX] = 52 if tdcs.gpaw else 48
    gprs[RDX] = tdcs.attributes
    gprs[R8] = tdcs.num_vcpus | tdcs.max_vcpus << 32
    gprs[R9] = tdvps.vcpu_index
    gprs[R10] = 1
    gprs[R11] = 0
    return 0

"""TDG.VP.INVEPT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_invept(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Invalidate cached translations of L2 VMs.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  mask of the L2 VMs: bits 3:1
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.INVEPT.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    mask = tdvps.cpu.gprs[RCX]
    if mask & 1 or mask >> tdvps.tdr.tdcs.num_l2_vms + 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if mask:
        raise NotModelled("translations of L2 VMs")
    return 0

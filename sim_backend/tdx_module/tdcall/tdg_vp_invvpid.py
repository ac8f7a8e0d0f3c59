"""TDG.VP.INVVPID."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_invvpid(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Invalidate cached linear translations of an L2 VM.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  bit 0: RDX is a list; bits 53:52: the L2 VM
    RDX     in  one entry, or a list of guest-linear addresses
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.VP.INVVPID.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    flags = tdvps.cpu.gprs[RCX]
    vm = flags >> 52 & 3
    if not 0 < vm <= tdvps.tdr.tdcs.num_l2_vms or flags & ~(1 | 3 << 52):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    raise NotModelled("translations of L2 VMs")

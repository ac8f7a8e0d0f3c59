"""TDG.VP.ENTER."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import is_gpa_valid
from sim_backend.tdx_module.not_modelled import NotModelled
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


def tdg_vp_enter(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:  # noqa: ARG001
    """Enter an L2 VM.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  bits 1:0: what to invalidate; bits 53:52: the L2 VM
    RDX     in  GPA of the L2 guest's registers, private, 256-byte-aligned
    ======= === ============================================================

    L2 VMs are not modelled: only the checks are, which a TD without L2 VMs never passes.

    Spec: TDX Module ABI Reference, TDG.VP.ENTER.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    tdcs = tdvps.tdr.tdcs
    if gprs[RDX] & 0xFF or not is_gpa_valid(tdcs, gprs[RDX], private_only=True):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    vm = gprs[RCX] >> 52 & 3
    if not 0 < vm <= tdcs.num_l2_vms or gprs[RCX] & ~(3 | 3 << 52):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    raise NotModelled("TD partitioning: entering an L2 VM")

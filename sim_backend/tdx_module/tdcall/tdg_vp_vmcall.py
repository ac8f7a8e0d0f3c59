"""TDG.VP.VMCALL."""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import RAX, RBP, RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.outcome import EXITED
from sim_backend.tdx_module.td_exit import BUS_LOCK_PREEMPTED, advance_rip, leave
from sim_backend.tdx_module.td_params import FLAG_NO_RBP_MOD
from sim_backend.tdx_module.tdvps import LastTdExit, VcpuState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_TDCALL: Final = int(ExitReason.TDCALL)
_READY: Final = int(VcpuState.READY)
_LAST_TDVMCALL: Final = int(LastTdExit.TDVMCALL)
_NEVER_PASSED: Final = 1 << 0 | 1 << 1 | 1 << 4  # RAX, RCX, RSP


@lru_cache(maxsize=256)
def selected_registers(mask: int) -> tuple[int, ...]:
    """Return the indexes of the GPRs, from RDX on, that RCX[15:0] = `mask` passes."""
    return tuple(register for register in range(2, 16) if mask >> register & 1)


@lru_cache(maxsize=256)
def _what_the_host_gets(mask: int, keep_rbp: bool) -> itemgetter[tuple[int, ...]]:
    """Return what picks the host's RDX to R15 out of the guest's 16 GPRs, a zero, and the host's own RBP."""
    return itemgetter(*(r if mask >> r & 1 else 17 if keep_rbp and r == RBP else 16 for r in range(2, 16)))


def tdg_vp_vmcall(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Leave the TD to call the host: the registers that RCX selects go both ways.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  bits 15:0 GPRs, 31:16 XMMs to pass; RAX, RCX, RSP never
    ======= === ============================================================

    The TDCALL completes when the host enters the vCPU again: RAX is then 0. XMM registers are not modelled: what the
    host finds in its own is not said.

    Spec: TDX Module ABI Reference, TDG.VP.VMCALL; GHCI, "TDG.VP.VMCALL".
    """
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    gprs = cpu.gprs
    control = gprs[RCX]
    keep_rbp = bool(tdvps.tdr.tdcs.config_flags & FLAG_NO_RBP_MOD)

    # 1. RCX selects registers that can be passed.
    if control & (_NEVER_PASSED | (1 << RBP if keep_rbp else 0)) or control >> 32:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    mask = control & 0xFFFF
    regs[2:] = _what_the_host_gets(mask, keep_rbp)((*gprs, 0, regs[RBP]))
    regs[RCX] = control | tdvps.curr_vm << 32
    regs[RAX] = _TDCALL | (BUS_LOCK_PREEMPTED if tdvps.bus_lock_preempted else 0)
    tdvps.bus_lock_preempted = False
    leave(module, lp, tdvps, _READY, _LAST_TDVMCALL)
    advance_rip(tdvps)
    return EXITED

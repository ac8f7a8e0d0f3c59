"""How a TD exits: what the host sees in its registers, and what becomes of the vCPU.

Spec: TDX Module ABI Reference, TDH.VP.ENTER, "Output Operands Formats".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, Gprs
from sim_backend.tdx_module.tdvps import LastTdExit, Tdvps, VcpuState
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_READY: Final = int(VcpuState.READY)
_DISABLED: Final = int(VcpuState.DISABLED)
_FAULT: Final = int(LastTdExit.ASYNC_FAULT)
_TRAP: Final = int(LastTdExit.ASYNC_TRAP)
_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
_EPT_MISCONFIGURATION: Final = int(ExitReason.EPT_MISCONFIGURATION)

_RECOVERABLE: Final[dict[int, int]] = {
    Status.SUCCESS: _FAULT,
    Status.CROSS_TD_FAULT: _FAULT,
    Status.CROSS_TD_TRAP: _TRAP,
    Status.HOST_PRIORITY_BUSY_TIMEOUT: _TRAP,
}
"""Exits after which the vCPU may be entered again, and how the TDCALL that led there ended."""

BUS_LOCK_PREEMPTED: Final = 1 << 26
"""In an exit reason: a bus lock happened too."""

_ZEROED: Final = (RBX, RBP, RSI, RDI, R10, R11, R12, R13, R14, R15)

# Extended exit qualification, bits 3:0.
EEQ_NONE: Final = 0
EEQ_ACCEPT: Final = 1
EEQ_ATTR_WR: Final = 5
EEQ_PENDING_EPT_VIOLATION: Final = 6

# Exit qualification of EPT violations: bits that the host is not shown (12:7 and some of the advanced ones).
_EPT_QUALIFICATION_HIDDEN: Final = 0x1F80


class TdExit(Exception):  # noqa: N818 - leaves a TDCALL leaf, whose TDCALL is not completed
    """The LP has left the TD: the host's registers are set."""


def advance_rip(tdvps: Tdvps) -> None:
    """Complete the instruction that exited."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    cpu.rip = cpu.rip + cpu.exit.instruction_length & 0xFFFF_FFFF_FFFF_FFFF


def leave(module: TdxModule, lp: int, tdvps: Tdvps, vcpu_state: int, last_td_exit: int) -> None:
    """Take the LP out of the TD: states, TLB tracking, the locks that TDH.VP.ENTER took."""
    tdvps.vcpu_state = vcpu_state
    tdvps.last_td_exit = last_td_exit
    tdvps.tdr.tdcs.refcount[tdvps.vcpu_epoch & 1] -= 1
    _release(module, lp, tdvps)


def _release(module: TdxModule, lp: int, tdvps: Tdvps) -> None:
    module.running[lp] = None
    module.pamt.release(tdvps.held)


def async_exit(
    module: TdxModule,
    lp: int,
    regs: Gprs,
    tdvps: Tdvps,
    reason: int,
    *,
    status: int = Status.SUCCESS,
    qualification: int = 0,
    extended: int = 0,
    gpa: int = 0,
    interruption: int = 0,
    with_reason: bool = True,
) -> None:
    """Do an asynchronous TD exit for VMX exit `reason`; `regs` become what TDH.VP.ENTER returns.

    `status` is RAX[63:32]; the fatal ones make the whole TD unusable. `with_reason` is False where no VM exit is
    being reported.
    """
    if tdvps.bus_lock_preempted:
        # It is told only with an exit that has a reason, and forgotten with any.
        reason |= BUS_LOCK_PREEMPTED if with_reason else 0
        tdvps.bus_lock_preempted = False
    last = _RECOVERABLE.get(status)
    if last is not None:
        leave(module, lp, tdvps, _READY, last)
        if last == _TRAP:
            advance_rip(tdvps)
    elif status == Status.NON_RECOVERABLE_VCPU:
        leave(module, lp, tdvps, _DISABLED, tdvps.last_td_exit)
    else:
        tdvps.tdr.fatal = True
        if status == Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE:  # the TD's memory may not even be touched
            _release(module, lp, tdvps)
        else:
            leave(module, lp, tdvps, tdvps.vcpu_state, tdvps.last_td_exit)
    regs[RAX] = module.profile.statuses.get(status, status) << 32 | reason & 0xFFFF_FFFF
    regs[RCX] = qualification & 0xFFFF_FFFF | tdvps.curr_vm << 32
    regs[RDX] = extended
    regs[R8] = gpa
    regs[R9] = interruption
    for register in _ZEROED:
        regs[register] = 0


def ept_violation_exit(
    module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, gpa: int, qualification: int, extended: int = 0
) -> None:
    """Do a TD exit for an EPT violation; the host is shown the page and the kind of access."""
    async_exit(
        module,
        lp,
        regs,
        tdvps,
        _EPT_VIOLATION,
        qualification=qualification & ~_EPT_QUALIFICATION_HIDDEN,
        extended=extended,
        gpa=gpa & ~0xFFF,
    )


def ept_misconfiguration_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, gpa: int) -> None:
    """Do a TD exit for an EPT misconfiguration of a shared GPA."""
    async_exit(module, lp, regs, tdvps, _EPT_MISCONFIGURATION, gpa=gpa & ~0xFFF)

"""TLB tracking: when nobody can hold a stale translation of a blocked page any more.

Source: TDX Module 1.5 Base Architecture Specification, "Secure EPT Concurrency and TLB Tracking".
"""

from typing import Final

from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import TLB_TRACKING
from sim_backend.tdx_module.sept import show_entry
from sim_backend.tdx_module.sept_states import SeptState, state_of
from sim_backend.tdx_module.tdcs import Tdcs
from uapi_ctypes.tdx_status import Operand, Status

_S = SeptState
MIGRATION_EPOCH: Final = 1 << 63
"""BEPOCH with this bit counts exports, not TLB epochs."""

BLOCKED_STATES: Final = 1 << _S.NL_BLOCKED | 1 << _S.BLOCKED | 1 << _S.PENDING_BLOCKED
UNTRACKED_STATES: Final = 1 << _S.FREE | 1 << _S.REMOVED | 1 << _S.EXPORTED_BLOCKEDW | 1 << _S.PENDING_EXPORTED_BLOCKEDW
"""States in which no TLB can hold the translation: nothing to track."""


def is_tracked(tdcs: Tdcs, bepoch: int) -> bool:
    """Tell whether every vCPU has left the TD since TD_EPOCH was `bepoch`."""
    previous = tdcs.td_epoch - 1
    return bepoch < previous or (bepoch == previous and tdcs.refcount[bepoch & 1] == 0)


def check_blocked_and_tracked(tdcs: Tdcs, entry: int, level: int, bepoch: int, regs: Gprs) -> None:
    """Check that the page or table of Secure EPT entry `entry` at `level` is blocked and tracked, if it has to be.

    Raise GPA_RANGE_NOT_BLOCKED(RCX), which shows the entry in RCX and RDX, or TLB_TRACKING_NOT_DONE(RCX).
    """
    state = state_of(entry)
    if UNTRACKED_STATES >> state & 1 or not TLB_TRACKING >> tdcs.op_state & 1:
        return
    if not BLOCKED_STATES >> state & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    if not is_tracked(tdcs, bepoch):
        raise LeafError(Status.TLB_TRACKING_NOT_DONE, Operand.RCX)

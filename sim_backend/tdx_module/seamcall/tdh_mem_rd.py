"""TDH.MEM.RD, and what TDH.MEM.WR shares with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sept import leaf_hpa, lock_entry, private_gpa, show_entry, walk
from sim_backend.tdx_module.sept_states import PS, RWX, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_RD_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_RD]
_RD_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_RD]


def tdh_mem_rd(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Read 8 bytes of a DEBUG TD's private memory.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  private GPA, 8-byte aligned
    RDX     in  HPA of the TDR page
    RCX,RDX out 0; on a Secure EPT error, the entry
    R8      out the value
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.RD.
    """
    index = debug_access(module, regs, _RD_OP_STATES, _RD_SEPT_STATES)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    regs[R8] = module.q[index]
    return 0


def debug_access(module: TdxModule, regs: Gprs, allowed_op_states: int, allowed_sept_states: int) -> int:
    """Do the checks of TDH.MEM.RD and TDH.MEM.WR; return the word index of the 8 bytes."""
    gpa, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = regs[R8] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a DEBUG TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, allowed_op_states)
    tdcs = tdr.tdcs
    if not tdcs.attributes & 1:
        raise LeafError(Status.TD_NON_DEBUG)

    # 2. RCX is an aligned private GPA.
    if gpa & 7:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    private_gpa(gpa, tdcs, Operand.RCX)

    # 3. A present page is there, and in a suitable state.
    q = module.q
    index, level = walk(q, tdcs, gpa, 0)
    entry = q[index]
    if not entry & PS or not entry & RWX:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_NOT_PRESENT, Operand.RCX)
    lock_entry(q, index, level, regs)
    if not allowed_sept_states >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    return leaf_hpa(entry, level, gpa) >> 3

"""TDH.MEM.RANGE.BLOCK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sept import LEVEL_SHIFT, clear_accept_counter, forget_walk, gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import ENCODING, HPA_MASK, PS, RWX, STATE_MASK, TRANSITIONS, state_of
from sim_backend.tdx_module.tlb_tracking import BLOCKED_STATES
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_RANGE_BLOCK]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_RANGE_BLOCK]
_NEW_STATE_BITS: Final = {
    int(state): ENCODING[new] for (state, leaf), new in TRANSITIONS.items() if leaf == SeamcallLeaf.TDH_MEM_RANGE_BLOCK
}


def tdh_mem_range_block(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Block a page or a table of the Secure EPT: no new translation can be made from it.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 to the root level, private GPA
    RDX     in  HPA of the TDR page
    RCX,RDX out 0; on a Secure EPT error, the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.RANGE.BLOCK.
    """
    rcx, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names an entry; this LP has the Secure EPT for itself and the walk reaches the entry.
    gpa, level = gpa_mapping(rcx, tdcs, 0, tdcs.pwl)
    if not tdcs.sept_lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 3. The entry is present and not blocked.
    entry = q[index]
    state = state_of(entry)
    if not _SEPT_STATES >> state & 1:
        show_entry(regs, entry, level)
        if BLOCKED_STATES >> state & 1:
            raise LeafError(Status.GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if entry & PS:
        page = entry & HPA_MASK & -(1 << LEVEL_SHIFT[level])
        pamt_entry = module.pamt.entry(page, level)
    else:
        pamt_entry = module.pamt.entry_4k(entry & HPA_MASK)
    forget_walk(tdcs)
    q[index] = clear_accept_counter(entry, level) & ~(STATE_MASK | RWX) | _NEW_STATE_BITS[state]
    q[pamt_entry + 1] = tdcs.td_epoch
    return 0

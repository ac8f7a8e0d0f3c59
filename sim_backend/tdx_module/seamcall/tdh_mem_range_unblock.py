"""TDH.MEM.RANGE.UNBLOCK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import TLB_TRACKING
from sim_backend.tdx_module.sept import LEVEL_SHIFT, gpa_mapping, show_entry, unblocked, walk_to
from sim_backend.tdx_module.sept_states import HPA_MASK, PS, state_of
from sim_backend.tdx_module.tlb_tracking import is_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_RANGE_UNBLOCK]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_RANGE_UNBLOCK]


def tdh_mem_range_unblock(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Undo TDH.MEM.RANGE.BLOCK.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 to the root level, private GPA
    RDX     in  HPA of the TDR page
    RCX,RDX out 0; on a Secure EPT error, the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.RANGE.UNBLOCK.
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

    # 3. The entry is blocked.
    entry = q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. Where vCPUs may run, none can hold the old translation any more. (This leaf blames the tree, not RCX.)
    if TLB_TRACKING >> tdcs.op_state & 1:
        if entry & PS:
            pamt_entry = module.pamt.entry(entry & HPA_MASK & -(1 << LEVEL_SHIFT[level]), level)
        else:
            pamt_entry = module.pamt.entry_4k(entry & HPA_MASK)
        if not is_tracked(tdcs, q[pamt_entry + 1]):
            raise LeafError(Status.TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    q[index] = unblocked(entry)
    return 0

"""TDH.MEM.SEPT.REMOVE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R9, R10, R11, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import forget_walk, gpa_mapping, is_table_free, show_entry, walk_to
from sim_backend.tdx_module.sept_states import FREE_ENTRY, HPA_MASK, state_of
from sim_backend.tdx_module.tlb_tracking import check_blocked_and_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_SEPT_REMOVE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_SEPT_REMOVE]
_NULL_PA: Final = (1 << 64) - 1


def tdh_mem_sept_remove(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Remove an empty page from the Secure EPT and free it.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level of the parent entry, private GPA
    RDX     in  HPA of the TDR page
    RCX     out HPA of the page; on a Secure EPT error, the entry
    RDX     out 0; on a Secure EPT error, level and state of the entry
    R9-R11  out version 1: HPAs of the L2 pages, or -1
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.SEPT.REMOVE.
    """
    rcx, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0
    version = regs[RAX] >> 16
    if version:
        regs[R9] = regs[R10] = regs[R11] = _NULL_PA

    # 1. The version is 0 or 1.
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)

    # 2. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 3. RCX names an entry; this LP has the Secure EPT for itself and the walk reaches the entry.
    gpa, level = gpa_mapping(rcx, tdcs, 1, tdcs.pwl)
    if not tdcs.sept_lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 4. The entry holds a table.
    entry = q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 5. This LP can lock the table exclusively.
    table = entry & HPA_MASK
    pamt_entry = module.pamt.entry_4k(table)
    module.pamt.lock_entry(pamt_entry, Operand.RCX, 1)

    # 6. Where vCPUs may run, it is blocked and tracked.
    check_blocked_and_tracked(tdcs, entry, level, q[pamt_entry + 1], regs)

    # 7. It is empty.
    if not is_table_free(module.memory, table):
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_PAGE_NOT_FREE, Operand.RCX)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    forget_walk(tdcs)
    q[index] = FREE_ENTRY
    tdr.chldcnt -= 1
    module.pamt.set_page_type(pamt_entry, PageType.NDA)
    regs[RCX] = table
    return 0

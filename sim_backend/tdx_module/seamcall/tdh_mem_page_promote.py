"""TDH.MEM.PAGE.PROMOTE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R9, R10, R11, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import LEVEL_SHIFT, clear_accept_counter, forget_walk, gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import HPA_MASK, SeptState, state_of
from sim_backend.tdx_module.tlb_tracking import check_blocked_and_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_PROMOTE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_PROMOTE]
_NULL_PA: Final = (1 << 64) - 1
_LEVEL_1G: Final = 2
_PROMOTABLE: Final = 1 << SeptState.MAPPED | 1 << SeptState.PENDING


def tdh_mem_page_promote(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Merge 512 pages of the same state, contiguous in physical memory, into one; free their table.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 1 or 2, private GPA
    RDX     in  HPA of the TDR page
    RCX     out HPA of the freed table; on a Secure EPT error, the entry
    RDX     out 0; on a Secure EPT error, level and state of the entry
    R9-R11  out version 1: HPAs of freed L2 tables, or -1
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.PROMOTE.
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

    # 3. RCX names a large range; the walk reaches its entry.
    gpa, level = gpa_mapping(rcx, tdcs, 1, _LEVEL_1G)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 4. The entry holds a table that this LP can lock exclusively.
    entry = q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    pamt = module.pamt
    table = entry & HPA_MASK
    table_entry = pamt.entry_4k(table)
    pamt.lock_entry(table_entry, Operand.RCX, 1)

    # 5. Where vCPUs may run, it is blocked and tracked.
    check_blocked_and_tracked(tdcs, entry, level, q[table_entry + 1], regs)

    # 6. Its entries map contiguous pages of one state from an aligned address.
    merged = _merge(q, table >> 3, level)
    if merged is None:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)

    # 7. The host has no interrupt to serve first.
    if module.platform.interrupt_pending(lp):
        regs[RCX], regs[RDX] = rcx, tdr_hpa
        raise LeafError(Status.INTERRUPTED_RESTARTABLE)

    # 8. This LP can lock the large page exclusively.
    page = merged & HPA_MASK
    page_entry = pamt.entry(page, level)
    pamt.lock_entry(page_entry, Operand.RCX, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    pamt.promote(page, level, page_entry)
    forget_walk(tdcs)
    q[index] = merged
    tdr.chldcnt -= 1
    pamt.set_page_type(table_entry, PageType.NDA)
    regs[RCX] = table
    return 0


def _merge(q: memoryview, table: int, level: int) -> int | None:
    """Return the entry that maps what the 512 entries at word index `table` map, or None."""
    first = clear_accept_counter(q[table], level - 1)
    if first & HPA_MASK & ((1 << LEVEL_SHIFT[level]) - 1) or not _PROMOTABLE >> state_of(first) & 1:
        return None
    step = 1 << LEVEL_SHIFT[level - 1]
    expected = first
    for child in range(1, 512):
        expected += step
        if clear_accept_counter(q[table + child], level - 1) != expected:
            return None
    return first

"""TDH.MEM.PAGE.DEMOTE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import LEVEL_SHIFT, clear_accept_counter, gpa_mapping, show_entry, unblocked, walk_to
from sim_backend.tdx_module.sept_states import HPA_MASK, TABLE_BITS, state_of
from sim_backend.tdx_module.tlb_tracking import check_blocked_and_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_DEMOTE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_DEMOTE]
_L2_SEPT_ADD_MODE: Final = 1
_NULL_PA: Final = (1 << 64) - 1
_NOT_USED: Final = 1 << 63
_LEVEL_1G: Final = 2


def tdh_mem_page_demote(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Split a large page into 512 smaller ones with the same contents and state.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 1 or 2, private GPA
    RDX     in  HPA of the TDR page; bit 0: L2 pages only where the page is aliased
    R8      in  HPA of a free page for the new Secure EPT table
    R9-R11  in  HPAs of free pages for L2 Secure EPT tables, or -1
    RCX,RDX out 0; on a Secure EPT error, the entry
    R9-R11  out the inputs; bit 63 set where the page was not needed
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.DEMOTE.
    """
    rcx, rdx, table = regs[RCX], regs[RDX], regs[R8]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    if rdx & ~(HPA_MASK | _L2_SEPT_ADD_MODE):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    tdr_hpa = rdx & HPA_MASK
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a large page; the walk reaches its entry.
    gpa, level = gpa_mapping(rcx, tdcs, 1, _LEVEL_1G)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 3. The entry maps a page.
    entry = q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. Where vCPUs may run, it is blocked and tracked.
    pamt = module.pamt
    page = entry & HPA_MASK & -(1 << LEVEL_SHIFT[level])
    entry = clear_accept_counter(entry, level)
    page_entry = pamt.entry(page, level)
    check_blocked_and_tracked(tdcs, entry, level, q[page_entry + 1], regs)

    # 5. R8 is a free page that this LP can lock exclusively; so are the pages for L2 VMs.
    table_entry = pamt.lock(table, PageType.NDA, Operand.R8, 1)
    for register in (R9, R10, R11)[: tdcs.num_l2_vms]:
        if regs[register] != _NULL_PA and not rdx & _L2_SEPT_ADD_MODE:
            pamt.lock(regs[register] & ~_NOT_USED, PageType.NDA, register, 1)
            raise NotModelled("TDH.MEM.PAGE.DEMOTE with an L2 Secure EPT page")

    # 6. The host has no interrupt to serve first.
    if module.platform.interrupt_pending(lp):
        regs[RCX], regs[RDX] = rcx, rdx
        raise LeafError(Status.INTERRUPTED_RESTARTABLE)

    # 7. This LP can lock the large page exclusively.
    pamt.lock_entry(page_entry, Operand.RCX, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    for register in (R9, R10, R11)[: tdcs.num_l2_vms]:
        if regs[register] != _NULL_PA:
            regs[register] |= _NOT_USED
    pamt.demote(page, level, page_entry)
    first = unblocked(entry & ~HPA_MASK | page)
    step = 1 << LEVEL_SHIFT[level - 1]
    for child in range(512):
        q[(table >> 3) + child] = first + child * step
    q[index] = TABLE_BITS | table
    tdr.chldcnt += 1
    pamt.set_page(table_entry, PageType.EPT, tdr_hpa)
    return 0

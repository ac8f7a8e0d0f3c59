"""TDH.MEM.PAGE.REMOVE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import LEVEL_SHIFT, clear_accept_counter, gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import FREE_ENTRY, HPA_MASK, PS, state_of
from sim_backend.tdx_module.tlb_tracking import check_blocked_and_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_REMOVE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_REMOVE]
_LEVEL_1G: Final = 2


def tdh_mem_page_remove(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Unmap a private page and free it. Its contents stay: the host must scrub them.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 to 2, private GPA
    RDX     in  HPA of the TDR page
    RCX     out HPA of the page; on a Secure EPT error, the entry
    RDX     out 0; on a Secure EPT error, level and state of the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.REMOVE.
    """
    rcx, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a page; the walk reaches its entry.
    gpa, level = gpa_mapping(rcx, tdcs, 0, _LEVEL_1G)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 3. The entry maps a page.
    entry = q[index]
    if not entry & PS or not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. This LP can lock the page exclusively.
    pamt = module.pamt
    page = entry & HPA_MASK & -(1 << LEVEL_SHIFT[level])
    pamt_entry = pamt.entry_4k(page) if not level else pamt.entry(page, level)
    pamt.lock_entry(pamt_entry, Operand.RCX, 1)

    # 5. Where vCPUs may run, the page is blocked and tracked.
    entry = clear_accept_counter(entry, level)
    check_blocked_and_tracked(tdcs, entry, level, q[pamt_entry + 1], regs)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if OpState.MEMORY_IMPORT <= tdcs.op_state <= OpState.LIVE_IMPORT:
        raise NotModelled("TDH.MEM.PAGE.REMOVE while a TD is imported")
    q[index] = FREE_ENTRY
    tdr.chldcnt -= 1 << 9 * level
    pamt.set_page_type(pamt_entry, PageType.NDA)
    regs[RCX] = page
    return 0

"""TDH.MEM.PAGE.RELOCATE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, unblocked, walk_to
from sim_backend.tdx_module.sept_states import HPA_MASK, PS, TDP, state_of
from sim_backend.tdx_module.tlb_tracking import check_blocked_and_tracked
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_RELOCATE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_RELOCATE]


def tdh_mem_page_relocate(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Move a private 4 KiB page to another physical page, contents included.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0, private GPA
    RDX     in  HPA of the TDR page
    R8      in  HPA of the free page to move to
    RCX     out HPA of the old page; on a Secure EPT error, the entry
    RDX     out 0; on a Secure EPT error, level and state of the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.RELOCATE.
    """
    rcx, tdr_hpa, target = regs[RCX], regs[RDX], regs[R8]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a 4 KiB page; the walk reaches its entry.
    gpa, _ = gpa_mapping(rcx, tdcs, 0, 0)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, 0, regs)

    # 3. The entry maps a page.
    entry = q[index]
    if not entry & PS or not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, 0)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. It is not R8 already, and this LP can lock it exclusively.
    source = entry & HPA_MASK
    if source == target:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    source_entry = module.pamt.entry_4k(source)
    module.pamt.lock_entry(source_entry, Operand.RCX, 1)

    # 5. Where vCPUs may run, it is blocked and tracked.
    check_blocked_and_tracked(tdcs, entry, 0, q[source_entry + 1], regs)

    # 6. R8 is a free page that this LP can lock exclusively.
    target_entry = module.pamt.lock(target, PageType.NDA, Operand.R8, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if not entry & TDP:
        memory = module.memory.b
        memory[target : target + 4096] = memory[source : source + 4096]
    module.pamt.set_page_type(source_entry, PageType.NDA)
    module.pamt.set_page(target_entry, PageType.REG, tdr_hpa)
    q[target_entry + 1] = 0
    q[index] = unblocked(entry & ~HPA_MASK | target)
    regs[RCX] = source
    return 0

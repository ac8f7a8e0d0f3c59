"""TDH.MEM.PAGE.AUG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import ENTRY_BITS, SeptState, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_AUG]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_AUG]
_PENDING: Final = ENTRY_BITS[SeptState.PENDING]
_RDX: Final = int(Operand.RDX)
_R8: Final = int(Operand.R8)
_NDA: Final = int(PageType.NDA)
_REG: Final = int(PageType.REG)


def tdh_mem_page_aug(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Map a new private page that the guest has to accept before it can use it.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 (4 KiB) or 1 (2 MiB), private GPA
    RDX     in  HPA of the TDR page
    R8      in  HPA of the free page, aligned to its size
    RCX,RDX out 0; on a Secure EPT error, the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.AUG.
    """
    rcx, tdr_hpa, page = regs[RCX], regs[RDX], regs[R8]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, _RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a 4 KiB or 2 MiB page; the walk reaches its entry.
    gpa, level = gpa_mapping(rcx, tdcs, 0, 1)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 3. The entry is free.
    entry = q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. R8 is a free page of that size that this LP can lock exclusively; each 4 KiB of it is free.
    pamt = module.pamt
    pamt_entry = pamt.lock(page, _NDA, _R8, 1, level)
    if level and not pamt.is_2m_range_free(page):
        raise LeafError(Status.PAGE_METADATA_INCORRECT, Operand.R8)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    q[index] = _PENDING | page
    tdr.chldcnt += 1 << 9 * level
    pamt.set_page(pamt_entry, _REG, tdr_hpa)
    q[pamt_entry + 1] = 0
    return 0

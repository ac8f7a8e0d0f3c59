"""TDH.MEM.PAGE.ADD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.mrtd import add_block
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, walk
from sim_backend.tdx_module.sept_states import ENTRY_BITS, SeptState, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_ADD]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_PAGE_ADD]
_MAPPED: Final = ENTRY_BITS[SeptState.MAPPED]
_RDX: Final = int(Operand.RDX)
_R8: Final = int(Operand.R8)
_R9: Final = int(Operand.R9)
_NDA: Final = int(PageType.NDA)
_REG: Final = int(PageType.REG)


def tdh_mem_page_add(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Copy a source page into a new private page, map it, and extend MRTD with its GPA.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 (4 KiB), private GPA
    RDX     in  HPA of the TDR page
    R8      in  HPA of the free page to add
    R9      in  HPA of the source page, shared; may be the page itself
    RCX,RDX out 0; on a Secure EPT error, the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.PAGE.ADD.
    """
    rcx, tdr_hpa, page, source = regs[RCX], regs[RDX], regs[R8], regs[R9]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock exclusively, of a TD that is being built.
    tdr = module.lock_tdr(tdr_hpa, _RDX, 1)
    module.check_td_locked(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a 4 KiB page; the walk reaches its entry. (Nobody else walks: the TDR is ours.)
    gpa, _ = gpa_mapping(rcx, tdcs, 0, 0)
    q = module.q
    index, reached = walk(q, tdcs, gpa, 0)
    entry = q[index]
    if reached:
        show_entry(regs, entry, reached)
        raise LeafError(Status.EPT_WALK_FAILED, Operand.RCX)

    # 3. The entry is free.
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, 0)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 4. R9 is shared memory.
    module.check_shared_hpa(source, 4096, _R9)

    # 5. R8 is a free page that this LP can lock exclusively.
    pamt_entry = module.pamt.lock(page, _NDA, _R8, 1)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.copy_from_shared(source, page)
    q[index] = _MAPPED | page
    tdcs.measurement.extend(add_block(gpa))
    tdr.chldcnt += 1
    module.pamt.set_page(pamt_entry, _REG, tdr_hpa)
    q[pamt_entry + 1] = 0
    return 0

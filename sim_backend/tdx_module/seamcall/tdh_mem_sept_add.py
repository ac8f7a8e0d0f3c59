"""TDH.MEM.SEPT.ADD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import FREE_ENTRY, HPA_MASK, TABLE_BITS, SeptState, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_SEPT_ADD]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_SEPT_ADD]
_FREE: Final = int(SeptState.FREE)
_NULL_PA: Final = (1 << 64) - 1
_NOT_USED: Final = 1 << 63
"""Set in an operand's output: the page was not needed."""
_FREE_TABLE: Final = FREE_ENTRY.to_bytes(8, "little") * 512
_ALLOW_EXISTING: Final = 1


def tdh_mem_sept_add(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Add a page to the Secure EPT.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level of the parent entry, private GPA
    RDX     in  HPA of the TDR page; bit 0: an existing page is no error
    R8      in  HPA of the free page to add
    R9-R11  in  version 1: HPAs of the pages for L2 VMs, or -1
    RCX,RDX out 0; on a Secure EPT error, the entry
    R8-R11  out version 1: -1 where the page was added, bit 63 where it was not needed
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.SEPT.ADD.
    """
    rcx, rdx = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0
    version = regs[RAX] >> 16

    # 1. The version is 0 or 1.
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    if not version:
        return _add(module, rcx, rdx, regs, regs[R8] if regs[R8] == _NULL_PA else regs[R8] & ~_NOT_USED, 0)

    for register in (R8, R9, R10, R11):
        if regs[register] != _NULL_PA:
            regs[register] &= ~_NOT_USED
    return _add(module, rcx, rdx, regs, regs[R8], 1)


def _add(module: TdxModule, rcx: int, rdx: int, regs: Gprs, page: int, version: int) -> int:
    # 2. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    if rdx & ~(HPA_MASK | _ALLOW_EXISTING):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    tdr_hpa = rdx & HPA_MASK
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 3. RCX names an entry for a table; the walk reaches it.
    gpa, level = gpa_mapping(rcx, tdcs, 1, tdcs.pwl)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    q = module.q
    index = walk_to(q, tdcs, gpa, level, regs)

    # 4. The entry is free or holds a table.
    entry = q[index]
    state = state_of(entry)
    if not _SEPT_STATES >> state & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 5. R8 is a free page that this LP can lock exclusively, or the table is there and may be.
    pamt_entry = -1
    if page == _NULL_PA:
        if not version:
            raise LeafError(Status.OPERAND_INVALID, Operand.R8)
        if state == _FREE:
            show_entry(regs, entry, level)
            raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    elif state == _FREE:
        pamt_entry = module.pamt.lock(page, PageType.NDA, Operand.R8, 1)
    elif rdx & _ALLOW_EXISTING:
        if version:
            regs[R8] |= _NOT_USED
    else:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)

    # 6. Pages for L2 VMs are for L2 VMs that the TD has.
    if version:
        for vm, register in enumerate((R9, R10, R11), 1):
            if regs[register] != _NULL_PA:
                if vm > tdcs.num_l2_vms:
                    raise LeafError(Status.OPERAND_INVALID, register)
                raise NotModelled("TDH.MEM.SEPT.ADD of an L2 Secure EPT page")

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if pamt_entry >= 0:
        module.memory.b[page : page + 4096] = _FREE_TABLE
        q[index] = TABLE_BITS | page
        tdr.chldcnt += 1
        module.pamt.set_page(pamt_entry, PageType.EPT, tdr_hpa)
        q[pamt_entry + 1] = 0
        if version:
            regs[R8] = _NULL_PA
    return 0

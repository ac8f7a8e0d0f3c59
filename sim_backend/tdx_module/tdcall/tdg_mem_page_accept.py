"""TDG.MEM.PAGE.ACCEPT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.hw.memory import PAGE_SIZE
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import ACCEPTABLE
from sim_backend.tdx_module.outcome import INTERRUPTED
from sim_backend.tdx_module.sept import LEVEL_SHIFT, gpa_mapping, walk
from sim_backend.tdx_module.sept_states import (
    ENTRY_BITS,
    HPA_MASK,
    PS,
    PUBLIC,
    RWX,
    TDEL,
    TDHP,
    TRANSITIONS,
    SeptState,
    state_of,
)
from sim_backend.tdx_module.td_exit import EEQ_ACCEPT, TdExit, ept_violation_exit
from sim_backend.tdx_module.tdcall.tdg_mr_report import IA32_INTR_PENDING
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_LEAF: Final = TdcallLeaf.TDG_MEM_PAGE_ACCEPT
_ACCEPTED: Final[dict[int, int]] = {
    state: ENTRY_BITS[to] | RWX for (state, leaf), to in TRANSITIONS.items() if leaf == _LEAF
}
"""The entry's bits, less the HPA, once a page in that state is accepted."""
_ACCESSIBLE: Final = frozenset({
    SeptState.MAPPED, SeptState.BLOCKEDW, SeptState.EXPORTED_BLOCKEDW, SeptState.EXPORTED_DIRTY,
    SeptState.EXPORTED_DIRTY_BLOCKEDW,
})  # fmt: skip
_ACCEPT_COUNTER: Final = 0x1F_F000  # HPA bits of a 2 MiB leaf that are free while the page is pending
_COUNTER_SHIFT: Final = 12
_WRITE: Final = 1 << 1


def lock_entry_as_guest(module: TdxModule, index: int) -> int:
    """Pass the lock of the Secure EPT entry at word `index` and return the entry; raise OPERAND_BUSY*(RCX)."""
    entry = module.q[index]
    if entry & TDEL:
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)
    if entry & TDHP:
        raise LeafError(Status.OPERAND_BUSY_HOST_PRIORITY, Operand.RCX)
    return entry


def exit_qualification(entry: int) -> int:
    """Return the EPT-violation qualification of a write to `entry`: what it is, and what it allows."""
    return _WRITE | (entry & RWX) << 3


def extended_qualification(kind: int, requested: int, entry: int, level: int) -> int:
    """Return the extended exit qualification of `kind` for an operation on `entry`, found at `level`."""
    info = requested | level << 3 | PUBLIC[state_of(entry)] << 6 | bool(entry & PS) << 14
    return kind | info << 32


def tdg_mem_page_accept(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Accept a pending private page: zero it and make it the guest's.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 (4 KiB) or 1 (2 MiB) and a private GPA
    ======= === ============================================================

    A pending interrupt cuts the acceptance of 2 MiB short after a 4 KiB page; the TDCALL then goes on from there.

    Spec: TDX Module ABI Reference, TDG.MEM.PAGE.ACCEPT.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    tdcs = tdvps.tdr.tdcs
    q = module.q

    # 1. RCX maps a private page.
    gpa, level = gpa_mapping(tdvps.cpu.gprs[RCX], tdcs, 0, 1)

    # 2. The Secure EPT walk reaches an entry at that level; a larger page may have been accepted already.
    index, reached = walk(q, tdcs, gpa, level)
    if reached != level:
        entry = q[index]
        if state_of(entry) in _ACCESSIBLE:
            raise LeafError(Status.PAGE_ALREADY_ACCEPTED, reached)
        raise _violation(module, lp, regs, tdvps, gpa, level, entry, reached)

    # 3. Nobody works on the entry; it is a leaf that waits for acceptance.
    entry = lock_entry_as_guest(module, index)
    state = state_of(entry)
    if not entry & PS and state != SeptState.FREE:
        raise LeafError(Status.PAGE_SIZE_MISMATCH, level)
    if state in _ACCESSIBLE:
        raise LeafError(Status.PAGE_ALREADY_ACCEPTED, level)
    if state not in ACCEPTABLE:
        raise _violation(module, lp, regs, tdvps, gpa, level, entry, level)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    hpa = entry & HPA_MASK
    if level == 1:
        hpa &= ~_ACCEPT_COUNTER
        done = (entry & _ACCEPT_COUNTER) >> _COUNTER_SHIFT
        if module.platform.rdmsr(lp, IA32_INTR_PENDING):
            module.memory.zero_page(hpa + done * PAGE_SIZE)
            if done != 511:
                q[index] = entry + (1 << _COUNTER_SHIFT)
                return INTERRUPTED
        else:
            module.memory.discard(hpa + done * PAGE_SIZE, (512 - done) * PAGE_SIZE)
    else:
        module.memory.zero_page(hpa)
    q[index] = _ACCEPTED[state] | hpa
    return 0


def _violation(
    module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, gpa: int, requested: int, entry: int, level: int
) -> TdExit:
    extended = extended_qualification(EEQ_ACCEPT, requested, entry, level)
    page = gpa & ~((1 << LEVEL_SHIFT[0]) - 1)
    ept_violation_exit(module, lp, regs, tdvps, page, exit_qualification(entry), extended)
    return TdExit()

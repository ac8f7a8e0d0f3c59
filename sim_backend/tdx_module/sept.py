"""Secure EPT: the walk to an entry, and what failed walks tell the host.

Tables are pages of real (simulated) memory: an entry is ``memory.q[index]``. States are in sept_states.py.
"""

from typing import Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sept_states import (
    ENTRY_BITS,
    FREE_ENTRY,
    HPA_MASK,
    PS,
    PUBLIC,
    RWX,
    STATE_MASK,
    SVE,
    TDEL,
    TDHP,
    TDP,
    TRANSITIONS,
    state_of,
)
from sim_backend.tdx_module.tdcs import NEVER_WALKED, Tdcs
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

_ARCHITECTURAL_LEAF: Final = 0x8000_0000_0000_00FF | HPA_MASK  # R, W, X, memory type, IPAT, PS, HPA, SVE
_ARCHITECTURAL_NON_LEAF: Final = RWX | PS
_FREE_STATE: Final = 0
_ACCEPT_COUNTER: Final = 0x1FF000
_FREE_TABLE: Final = FREE_ENTRY.to_bytes(8, "little") * 512
_UNBLOCKED: Final = {
    int(state): ENTRY_BITS[new]
    for (state, leaf), new in TRANSITIONS.items()
    if leaf == SeamcallLeaf.TDH_MEM_RANGE_UNBLOCK
}
LEVEL_SHIFT: Final = (12, 21, 30, 39, 48)
"""Level -> log2 of what an entry covers [bytes]."""


def gpa_mapping(rcx: int, tdcs: Tdcs, min_level: int, max_level: int) -> tuple[int, int]:
    """Decode a GPA-and-level operand in RCX; return (GPA, level) or raise OPERAND_INVALID(RCX).

    Bits 2:0 are the level, 51:12 the GPA, the others zero; the GPA is aligned to its level and private.
    """
    level = rcx & 7
    gpa = rcx & HPA_MASK
    if (
        rcx & ~(HPA_MASK | 7)
        or not min_level <= level <= max_level
        or gpa & ((1 << LEVEL_SHIFT[level]) - 1)
        or gpa >> tdcs.shared_bit
    ):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    return gpa, level


def architectural_entry(entry: int) -> int:
    """Return what the host is shown of `entry`: no module state, and no HPA of a table."""
    if state_of(entry) == _FREE_STATE:
        return SVE
    return entry & (_ARCHITECTURAL_LEAF if entry & PS else _ARCHITECTURAL_NON_LEAF)


def show_entry(regs: Gprs, entry: int, level: int) -> None:
    """Put the architectural entry into RCX, and level and public state into RDX."""
    regs[RCX] = architectural_entry(entry)
    regs[RDX] = level | PUBLIC[state_of(entry)] << 8


def walk(q: memoryview, tdcs: Tdcs, gpa: int, level: int) -> tuple[int, int]:
    """Walk to the entry of `gpa` at `level`; return its word index and the level where the walk ended.

    The walk ends early at an entry that is not present or is a leaf. The last table of 4 KiB entries is remembered in
    the TDCS; leaves that take tables out of the tree (`forget_walk`) make it forget.
    """
    if not level and gpa >> 21 == tdcs.walked_range:
        return tdcs.walked_table + (gpa >> 12 & 0x1FF), 0
    table = tdcs.sept_root >> 3
    at = tdcs.pwl
    shift = 12 + 9 * at
    while at > level:
        index = table + (gpa >> shift & 0x1FF)
        entry = q[index]
        if not entry & RWX or entry & PS:
            return index, at
        table = (entry & HPA_MASK) >> 3
        at -= 1
        shift -= 9
    if not level:
        tdcs.walked_range, tdcs.walked_table = gpa >> 21, table
    return table + (gpa >> shift & 0x1FF), level


def forget_walk(tdcs: Tdcs) -> None:
    """Walk from the root again: a table was blocked or left the tree."""
    tdcs.walked_range = NEVER_WALKED


def walk_to(q: memoryview, tdcs: Tdcs, gpa: int, level: int, regs: Gprs) -> int:
    """Walk to the entry of `gpa` at `level` and pass its lock; return its word index.

    Raise EPT_WALK_FAILED(RCX) or OPERAND_BUSY(RCX); both show the entry in RCX and RDX.
    """
    index, reached = walk(q, tdcs, gpa, level)
    if reached != level:
        show_entry(regs, q[index], reached)
        raise LeafError(Status.EPT_WALK_FAILED, Operand.RCX)
    if q[index] & (TDEL | TDHP):
        lock_entry(q, index, level, regs)
    return index


def lock_entry(q: memoryview, index: int, level: int, regs: Gprs) -> None:
    """Take and release an entry's lock for the host; raise OPERAND_BUSY(RCX), which shows the entry.

    A failure marks the entry for host priority, a success clears the mark.
    """
    entry = q[index]
    if entry & TDEL:
        q[index] = entry | TDHP
        show_entry(regs, entry, level)
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)
    q[index] = entry & ~TDHP


def walk_to_leaf(q: memoryview, tdcs: Tdcs, gpa: int) -> tuple[int, int]:
    """Walk towards the leaf that maps `gpa`; return the word index and level of the entry where the walk ended.

    Whether that is a present leaf its R, W, X and PS bits tell.
    """
    return walk(q, tdcs, gpa, 0)


def private_gpa(gpa: int, tdcs: Tdcs, operand: int) -> None:
    """Check that `gpa` is private and within the TD's GPA width; raise OPERAND_INVALID naming `operand`."""
    if gpa >> tdcs.shared_bit:
        raise LeafError(Status.OPERAND_INVALID, operand)


def leaf_hpa(entry: int, level: int, gpa: int) -> int:
    """Return the HPA that leaf `entry` at `level` maps `gpa` to."""
    offset_mask = (1 << LEVEL_SHIFT[level]) - 1
    return (entry & HPA_MASK & ~offset_mask) | (gpa & offset_mask)


def clear_accept_counter(entry: int, level: int) -> int:
    """Return `entry` without the progress of an interrupted TDG.MEM.PAGE.ACCEPT of 2 MiB (bits 20:12)."""
    if level == 1 and entry & TDP:
        return entry & ~_ACCEPT_COUNTER
    return entry


def unblocked(entry: int) -> int:
    """Return `entry` as it was before TDH.MEM.RANGE.BLOCK; an entry that is not blocked is returned as is."""
    new = _UNBLOCKED.get(state_of(entry))
    if new is None:
        return entry
    return entry & ~STATE_MASK | new


def is_table_free(memory: PhysicalMemory, table: int) -> bool:
    """Tell whether all of the 512 entries of the table at HPA `table` are free."""
    data = memory.b[table : table + 4096]
    if data == _FREE_TABLE:
        return True
    q = memory.q
    return all(state_of(q[index]) == _FREE_STATE for index in range(table >> 3, (table >> 3) + 512))

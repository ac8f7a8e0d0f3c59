"""Secure EPT entry states: how an entry encodes them, and which leaf leads from which to which.

Source: TDX Module 1.5 ABI Reference, "Secure EPT Entry"; Base Architecture Specification, "Secure EPT Entry
States"; release 1.5.01.
"""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

_H = SeamcallLeaf
_G = TdcallLeaf

# Bits of a Secure EPT entry. The hardware ignores D, TDEL and 52..56 in this mode; the module keeps its state there.
RWX: Final = 0b111
MEMORY_TYPE_WB: Final = 6 << 3
IPAT: Final = 1 << 6
PS: Final = 1 << 7
DIRTY: Final = 1 << 9
TDEL: Final = 1 << 11  # entry lock
TDHP: Final = 1 << 52  # host priority
TDEX: Final = 1 << 53  # exported
TDBW: Final = 1 << 54  # write-blocked
TDB: Final = 1 << 55  # blocked
TDP: Final = 1 << 56  # pending
SVE: Final = 1 << 63  # suppress #VE
HPA_MASK: Final = 0x000F_FFFF_FFFF_F000


class SeptState(IntEnum):
    """State of one entry; the value is an index, not what TDH.MEM.SEPT.RD shows (that is `PUBLIC`)."""

    FREE = 0
    REMOVED = 1
    NL_MAPPED = 2
    NL_BLOCKED = 3
    MAPPED = 4
    BLOCKED = 5
    BLOCKEDW = 6
    EXPORTED_BLOCKEDW = 7
    EXPORTED_DIRTY = 8
    EXPORTED_DIRTY_BLOCKEDW = 9
    PENDING = 10
    PENDING_BLOCKED = 11
    PENDING_BLOCKEDW = 12
    PENDING_EXPORTED_BLOCKEDW = 13
    PENDING_EXPORTED_DIRTY = 14
    PENDING_EXPORTED_DIRTY_BLOCKEDW = 15


_S = SeptState
_LEAF: Final = IPAT | PS

# fmt: off
ENCODING: Final = MappingProxyType({
    _S.FREE:                            TDEX | TDBW | TDB,
    _S.REMOVED:                         TDBW | TDB,
    _S.NL_MAPPED:                       0,
    _S.NL_BLOCKED:                      TDB,
    _S.MAPPED:                          _LEAF,
    _S.BLOCKED:                         _LEAF | TDB,
    _S.BLOCKEDW:                        _LEAF | TDBW,
    _S.EXPORTED_BLOCKEDW:               _LEAF | TDBW | TDEX,
    _S.EXPORTED_DIRTY:                  _LEAF | TDEX | DIRTY,
    _S.EXPORTED_DIRTY_BLOCKEDW:         _LEAF | TDBW | TDEX | DIRTY,
    _S.PENDING:                         _LEAF | TDP,
    _S.PENDING_BLOCKED:                 _LEAF | TDP | TDB,
    _S.PENDING_BLOCKEDW:                _LEAF | TDP | TDBW,
    _S.PENDING_EXPORTED_BLOCKEDW:       _LEAF | TDP | TDBW | TDEX,
    _S.PENDING_EXPORTED_DIRTY:          _LEAF | TDP | TDEX | DIRTY,
    _S.PENDING_EXPORTED_DIRTY_BLOCKEDW: _LEAF | TDP | TDBW | TDEX | DIRTY,
})

PUBLIC: Final = (
    0x00, 0x05, 0x84, 0x81, 0x04, 0x01, 0x08, 0x09, 0x0B, 0x0C, 0x02, 0x03, 0x10, 0x11, 0x13, 0x14,
)
"""`SeptState` -> the state byte that TDH.MEM.SEPT.RD and failed walks show."""
# fmt: on

STATE_MASK: Final = DIRTY | TDEX | TDBW | TDB | TDP | IPAT | PS
FREE_ENTRY: Final = ENCODING[_S.FREE] | SVE
"""What a new Secure EPT page is filled with."""
REMOVED_ENTRY: Final = ENCODING[_S.REMOVED] | SVE
LEAF_BITS: Final = MEMORY_TYPE_WB | IPAT | PS | SVE
"""Every leaf entry has these, whatever its state."""


def _state_table() -> list[int]:
    table = [-1] * 128
    for state, bits in ENCODING.items():
        table[(bits >> 52 & 0x1E) | (bits >> 9 & 1) | (bits >> 1 & 0x60)] = int(state)
    table[0x61] = int(_S.MAPPED)  # D is the CPU's to set while a page is mapped
    return table


STATE_OF: Final = _state_table()
"""``STATE_OF[e >> 52 & 0x1E | e >> 9 & 1 | e >> 1 & 0x60]`` is the state of entry `e`."""


def state_of(entry: int) -> int:
    """Return the `SeptState` of `entry` as a plain int; -1 for an encoding that no leaf writes."""
    return STATE_OF[(entry >> 52 & 0x1E) | (entry >> 9 & 1) | (entry >> 1 & 0x60)]


def _states(*states: int) -> int:
    return sum(1 << state for state in states)


_ANY_LEAF: Final = range(_S.MAPPED, _S.PENDING_EXPORTED_DIRTY_BLOCKEDW + 1)

# fmt: off
ALLOWED: Final = MappingProxyType({
    # leaf: mask of the states from which it may proceed
    _H.TDH_MEM_PAGE_ADD:      _states(_S.FREE),
    _H.TDH_MEM_SEPT_ADD:      _states(_S.FREE, _S.NL_MAPPED),
    _H.TDH_MEM_PAGE_RELOCATE: _states(*_ANY_LEAF),
    _H.TDH_MEM_PAGE_AUG:      _states(_S.FREE, _S.REMOVED),
    _H.TDH_MEM_RANGE_BLOCK:   _states(_S.NL_MAPPED, _S.MAPPED, _S.BLOCKEDW, _S.PENDING, _S.PENDING_BLOCKEDW),
    _H.TDH_MEM_RD:            _states(_S.MAPPED, _S.BLOCKEDW, _S.EXPORTED_BLOCKEDW, _S.EXPORTED_DIRTY,
                                      _S.EXPORTED_DIRTY_BLOCKEDW),
    _H.TDH_MEM_WR:            _states(_S.MAPPED, _S.EXPORTED_DIRTY),
    _H.TDH_MEM_PAGE_DEMOTE:   _states(_S.MAPPED, _S.BLOCKED, _S.PENDING, _S.PENDING_BLOCKED),
    _H.TDH_MR_EXTEND:         _states(_S.MAPPED),
    _H.TDH_MEM_PAGE_PROMOTE:  _states(_S.NL_MAPPED, _S.NL_BLOCKED),
    _H.TDH_MEM_SEPT_RD:       _states(*SeptState),
    _H.TDH_MEM_PAGE_REMOVE:   _states(_S.MAPPED, _S.BLOCKED, _S.BLOCKEDW, _S.PENDING, _S.PENDING_BLOCKED,
                                      _S.PENDING_BLOCKEDW),
    _H.TDH_MEM_SEPT_REMOVE:   _states(_S.NL_MAPPED, _S.NL_BLOCKED),
    _H.TDH_MEM_RANGE_UNBLOCK: _states(_S.NL_BLOCKED, _S.BLOCKED, _S.PENDING_BLOCKED),
    _H.TDH_EXPORT_BLOCKW:     _states(_S.MAPPED, _S.EXPORTED_DIRTY, _S.PENDING, _S.PENDING_EXPORTED_DIRTY),
    _H.TDH_EXPORT_RESTORE:    _states(_S.EXPORTED_BLOCKEDW, _S.EXPORTED_DIRTY, _S.EXPORTED_DIRTY_BLOCKEDW,
                                      _S.PENDING_EXPORTED_BLOCKEDW, _S.PENDING_EXPORTED_DIRTY,
                                      _S.PENDING_EXPORTED_DIRTY_BLOCKEDW),
    _H.TDH_EXPORT_MEM:        _states(*(s for s in _ANY_LEAF if s not in {_S.BLOCKED, _S.PENDING_BLOCKED})),
    _H.TDH_EXPORT_UNBLOCKW:   _states(_S.BLOCKEDW, _S.EXPORTED_BLOCKEDW, _S.EXPORTED_DIRTY_BLOCKEDW,
                                      _S.PENDING_BLOCKEDW, _S.PENDING_EXPORTED_BLOCKEDW,
                                      _S.PENDING_EXPORTED_DIRTY_BLOCKEDW),
    _H.TDH_IMPORT_MEM:        _states(_S.FREE, _S.REMOVED, _S.MAPPED, _S.PENDING),
})

ALLOWED_TDCALL: Final = MappingProxyType({
    _G.TDG_MEM_PAGE_ACCEPT:   _states(_S.PENDING, _S.PENDING_EXPORTED_DIRTY),
    _G.TDG_MEM_PAGE_ATTR_RD:  _states(*(s for s in _ANY_LEAF if s not in {_S.BLOCKED, _S.PENDING_BLOCKED})),
    _G.TDG_MEM_PAGE_ATTR_WR:  _states(_S.MAPPED, _S.EXPORTED_DIRTY, _S.PENDING, _S.PENDING_EXPORTED_DIRTY),
})

TRANSITIONS: Final = MappingProxyType({
    # from                leaf                          to
    (_S.FREE,             _H.TDH_MEM_SEPT_ADD):       _S.NL_MAPPED,
    (_S.FREE,             _H.TDH_MEM_PAGE_ADD):       _S.MAPPED,
    (_S.FREE,             _H.TDH_MEM_PAGE_AUG):       _S.PENDING,
    (_S.REMOVED,          _H.TDH_MEM_PAGE_AUG):       _S.PENDING,
    (_S.PENDING,          _G.TDG_MEM_PAGE_ACCEPT):    _S.MAPPED,
    (_S.PENDING_EXPORTED_DIRTY, _G.TDG_MEM_PAGE_ACCEPT): _S.EXPORTED_DIRTY,
    (_S.NL_MAPPED,        _H.TDH_MEM_RANGE_BLOCK):    _S.NL_BLOCKED,
    (_S.MAPPED,           _H.TDH_MEM_RANGE_BLOCK):    _S.BLOCKED,
    (_S.BLOCKEDW,         _H.TDH_MEM_RANGE_BLOCK):    _S.BLOCKED,
    (_S.PENDING,          _H.TDH_MEM_RANGE_BLOCK):    _S.PENDING_BLOCKED,
    (_S.PENDING_BLOCKEDW, _H.TDH_MEM_RANGE_BLOCK):    _S.PENDING_BLOCKED,
    (_S.NL_BLOCKED,       _H.TDH_MEM_RANGE_UNBLOCK):  _S.NL_MAPPED,
    (_S.BLOCKED,          _H.TDH_MEM_RANGE_UNBLOCK):  _S.MAPPED,
    (_S.PENDING_BLOCKED,  _H.TDH_MEM_RANGE_UNBLOCK):  _S.PENDING,
    (_S.MAPPED,           _H.TDH_MEM_PAGE_RELOCATE):  _S.MAPPED,
    (_S.BLOCKED,          _H.TDH_MEM_PAGE_RELOCATE):  _S.MAPPED,
    (_S.PENDING,          _H.TDH_MEM_PAGE_RELOCATE):  _S.PENDING,
    (_S.PENDING_BLOCKED,  _H.TDH_MEM_PAGE_RELOCATE):  _S.PENDING,
    (_S.MAPPED,           _H.TDH_MEM_PAGE_REMOVE):    _S.FREE,
    (_S.BLOCKED,          _H.TDH_MEM_PAGE_REMOVE):    _S.FREE,
    (_S.PENDING,          _H.TDH_MEM_PAGE_REMOVE):    _S.FREE,
    (_S.PENDING_BLOCKED,  _H.TDH_MEM_PAGE_REMOVE):    _S.FREE,
    (_S.NL_MAPPED,        _H.TDH_MEM_SEPT_REMOVE):    _S.FREE,
    (_S.NL_BLOCKED,       _H.TDH_MEM_SEPT_REMOVE):    _S.FREE,
    (_S.MAPPED,           _H.TDH_MEM_PAGE_DEMOTE):    _S.NL_MAPPED,
    (_S.BLOCKED,          _H.TDH_MEM_PAGE_DEMOTE):    _S.NL_MAPPED,
    (_S.PENDING,          _H.TDH_MEM_PAGE_DEMOTE):    _S.NL_MAPPED,
    (_S.PENDING_BLOCKED,  _H.TDH_MEM_PAGE_DEMOTE):    _S.NL_MAPPED,
})
"""One step of one leaf. TDH.MEM.PAGE.PROMOTE is not a row: its result is the state of the 512 children."""
# fmt: on

ENTRY_BITS: Final = {
    state: bits | SVE | (MEMORY_TYPE_WB if bits & PS else 0) | (RWX if state in (_S.NL_MAPPED, _S.MAPPED) else 0)
    for state, bits in ENCODING.items()
}
"""`SeptState` -> a whole entry without its HPA."""
TABLE_BITS: Final = ENTRY_BITS[_S.NL_MAPPED]
"""An entry that holds a table, without the table's HPA."""

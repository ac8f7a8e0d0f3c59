"""TD operation states, and which leaf is allowed in which.

The table is what `OpState` transitions and the docs' diagram are drawn from. Source: TDX Module 1.5 Base
Architecture Specification, "TD Operation State"; release 1.5.01.
"""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

_H = SeamcallLeaf
_G = TdcallLeaf


class OpState(IntEnum):
    """TDCS.OP_STATE."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10


_O = OpState

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from              leaf                              to
    (_O.UNINITIALIZED,  _H.TDH_MNG_INIT):               _O.INITIALIZED,
    (_O.INITIALIZED,    _H.TDH_MR_FINALIZE):            _O.RUNNABLE,
    (_O.RUNNABLE,       _H.TDH_EXPORT_STATE_IMMUTABLE): _O.LIVE_EXPORT,
    (_O.LIVE_EXPORT,    _H.TDH_EXPORT_PAUSE):           _O.PAUSED_EXPORT,
    (_O.PAUSED_EXPORT,  _H.TDH_EXPORT_TRACK):           _O.POST_EXPORT,  # the start token
    (_O.LIVE_EXPORT,    _H.TDH_EXPORT_ABORT):           _O.RUNNABLE,
    (_O.PAUSED_EXPORT,  _H.TDH_EXPORT_ABORT):           _O.RUNNABLE,
    (_O.POST_EXPORT,    _H.TDH_EXPORT_ABORT):           _O.RUNNABLE,
    (_O.UNINITIALIZED,  _H.TDH_IMPORT_STATE_IMMUTABLE): _O.MEMORY_IMPORT,
    (_O.MEMORY_IMPORT,  _H.TDH_IMPORT_STATE_TD):        _O.STATE_IMPORT,
    (_O.STATE_IMPORT,   _H.TDH_IMPORT_TRACK):           _O.POST_IMPORT,  # the start token
    (_O.POST_IMPORT,    _H.TDH_IMPORT_COMMIT):          _O.LIVE_IMPORT,
    (_O.LIVE_IMPORT,    _H.TDH_IMPORT_END):             _O.RUNNABLE,
    (_O.POST_IMPORT,    _H.TDH_IMPORT_END):             _O.RUNNABLE,
    (_O.MEMORY_IMPORT,  _H.TDH_IMPORT_ABORT):           _O.FAILED_IMPORT,
    (_O.STATE_IMPORT,   _H.TDH_IMPORT_ABORT):           _O.FAILED_IMPORT,
    (_O.POST_IMPORT,    _H.TDH_IMPORT_ABORT):           _O.FAILED_IMPORT,
})
"""One step of one leaf. Of migration the model has the error paths only: it never makes those steps."""
# fmt: on


def _allowed(columns: str) -> int:
    """Turn a row of the matrix into a mask: bit n is `OpState` n."""
    return sum(1 << state for state, column in enumerate(columns) if column == "1")


# fmt: off
ALLOWED: Final = MappingProxyType({
    # columns: 0 UNINITIALIZED .. 10 FAILED_IMPORT
    _H.TDH_VP_ENTER:               _allowed("00110000010"),
    _H.TDH_MNG_ADDCX:              _allowed("10000000000"),
    _H.TDH_MEM_PAGE_ADD:           _allowed("01000000000"),
    _H.TDH_MEM_SEPT_ADD:           _allowed("01110011110"),
    _H.TDH_VP_ADDCX:               _allowed("01000001000"),
    _H.TDH_MEM_PAGE_RELOCATE:      _allowed("01111100110"),
    _H.TDH_MEM_PAGE_AUG:           _allowed("01110000010"),
    _H.TDH_MEM_RANGE_BLOCK:        _allowed("01111100110"),
    _H.TDH_VP_CREATE:              _allowed("01000001000"),
    _H.TDH_MNG_RD:                 _allowed("01111111111"),
    _H.TDH_MEM_RD:                 _allowed("01111111111"),
    _H.TDH_MNG_WR:                 _allowed("01110011111"),
    _H.TDH_MEM_WR:                 _allowed("01110011111"),
    _H.TDH_MEM_PAGE_DEMOTE:        _allowed("01111100110"),
    _H.TDH_MR_EXTEND:              _allowed("01000000000"),
    _H.TDH_MR_FINALIZE:            _allowed("01000000000"),
    _H.TDH_VP_FLUSH:               _allowed("11111111111"),
    _H.TDH_MNG_INIT:               _allowed("10000000000"),
    _H.TDH_VP_INIT:                _allowed("01000000000"),
    _H.TDH_MEM_PAGE_PROMOTE:       _allowed("01111100110"),
    _H.TDH_MEM_SEPT_RD:            _allowed("01111111111"),
    _H.TDH_VP_RD:                  _allowed("01111111111"),
    _H.TDH_MEM_PAGE_REMOVE:        _allowed("01111100111"),
    _H.TDH_MEM_SEPT_REMOVE:        _allowed("01111111111"),
    _H.TDH_MEM_TRACK:              _allowed("01111111110"),
    _H.TDH_MEM_RANGE_UNBLOCK:      _allowed("01111100110"),
    _H.TDH_VP_WR:                  _allowed("01110011111"),
    _H.TDH_SERVTD_BIND:            _allowed("11110000110"),
    _H.TDH_SERVTD_PREBIND:         _allowed("11000000000"),
    _H.TDH_EXPORT_ABORT:           _allowed("00011100000"),
    _H.TDH_EXPORT_BLOCKW:          _allowed("00010000000"),
    _H.TDH_EXPORT_RESTORE:         _allowed("00100000000"),
    _H.TDH_EXPORT_MEM:             _allowed("00011100000"),
    _H.TDH_EXPORT_PAUSE:           _allowed("00010000000"),
    _H.TDH_EXPORT_TRACK:           _allowed("00011000000"),
    _H.TDH_EXPORT_STATE_IMMUTABLE: _allowed("00100000010"),
    _H.TDH_EXPORT_STATE_TD:        _allowed("00001000000"),
    _H.TDH_EXPORT_STATE_VP:        _allowed("00001000000"),
    _H.TDH_EXPORT_UNBLOCKW:        _allowed("00111100000"),
    _H.TDH_IMPORT_ABORT:           _allowed("00000011101"),
    _H.TDH_IMPORT_END:             _allowed("00000000110"),
    _H.TDH_IMPORT_COMMIT:          _allowed("00000000100"),
    _H.TDH_IMPORT_MEM:             _allowed("00000011110"),
    _H.TDH_IMPORT_TRACK:           _allowed("00000011000"),
    _H.TDH_IMPORT_STATE_IMMUTABLE: _allowed("10000000000"),
    _H.TDH_IMPORT_STATE_TD:        _allowed("00000010000"),
    _H.TDH_IMPORT_STATE_VP:        _allowed("00000001000"),
    _H.TDH_MIG_STREAM_CREATE:      _allowed("11100000000"),
})

ALLOWED_SERVICE_TD: Final = _allowed("00111100110")
"""TDH.SERVTD.BIND asks this of the *service* TD."""

ALLOWED_TDCALL: Final = MappingProxyType({
    # asked of the *target* TD
    _G.TDG_SERVTD_RD: _allowed("11111111111"),
    _G.TDG_SERVTD_WR: _allowed("11110011111"),
})

TLB_TRACKING: Final = _allowed("00110000010")
"""Where a page must be blocked and tracked before it goes: the states in which a vCPU may run."""
# fmt: on

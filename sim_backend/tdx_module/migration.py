"""Migration of TDs, as far as a TD gets without a migration stream's cryptography.

A session starts with TDH.EXPORT.STATE.IMMUTABLE or TDH.IMPORT.STATE.IMMUTABLE. Their checks are modelled, the session
is not: so a TD never leaves the states UNINITIALIZED, INITIALIZED and RUNNABLE, and the leaves below, which belong to
a session, are never allowed. They still check their operands in the module's order.

Spec: TDX Module TD Migration Architecture Spec; ABI Reference, TDH.EXPORT.* and TDH.IMPORT.*.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.op_states import ALLOWED
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

MIN_MIGS: Final = 2  # one forward and one backward stream
MBMD_ALIGNMENT: Final = 128
MBMD_BYTES: Final = 48
_MIGS_COMMAND_RESUME: Final = 1 << 63
_HPA: Final = 0xF_FFFF_FFFF_F000
_HPA_AND_SIZE_HPA: Final = (1 << 52) - 1
_HPA_AND_SIZE_SHIFT: Final = 52
_PAGE_LIST_RESERVED: Final = 0xFFF | 7 << 52
_PAGE_LIST_LAST_SHIFT: Final = 55


class _Td(Enum):
    """How a leaf takes its TD."""

    SHARED = "TDR shared, OP_STATE shared"
    STATE_EXCLUSIVE = "TDR shared, OP_STATE exclusive"
    EXCLUSIVE = "TDR exclusive"
    VCPU = "TDVPR exclusive, TDR shared, OP_STATE shared"


class _SessionLeaf(NamedTuple):
    register: int
    td: _Td
    outputs: tuple[int, ...] = ()  # zeroed on an error


_L = SeamcallLeaf
_SESSION_LEAVES: Final = {
    _L.TDH_EXPORT_ABORT: _SessionLeaf(RCX, _Td.STATE_EXCLUSIVE),
    _L.TDH_EXPORT_BLOCKW: _SessionLeaf(RDX, _Td.SHARED),
    _L.TDH_EXPORT_MEM: _SessionLeaf(RDX, _Td.SHARED),
    _L.TDH_EXPORT_PAUSE: _SessionLeaf(RCX, _Td.EXCLUSIVE),
    _L.TDH_EXPORT_TRACK: _SessionLeaf(RCX, _Td.STATE_EXCLUSIVE),
    _L.TDH_EXPORT_STATE_TD: _SessionLeaf(RCX, _Td.STATE_EXCLUSIVE, (RDX,)),
    _L.TDH_EXPORT_STATE_VP: _SessionLeaf(RCX, _Td.VCPU, (RDX,)),
    _L.TDH_IMPORT_ABORT: _SessionLeaf(RCX, _Td.EXCLUSIVE),
    _L.TDH_IMPORT_END: _SessionLeaf(RCX, _Td.EXCLUSIVE),
    _L.TDH_IMPORT_COMMIT: _SessionLeaf(RCX, _Td.EXCLUSIVE),
    _L.TDH_IMPORT_MEM: _SessionLeaf(RDX, _Td.SHARED),
    _L.TDH_IMPORT_TRACK: _SessionLeaf(RCX, _Td.EXCLUSIVE),
    _L.TDH_IMPORT_STATE_TD: _SessionLeaf(RCX, _Td.EXCLUSIVE, (RCX, RDX)),
    _L.TDH_IMPORT_STATE_VP: _SessionLeaf(RCX, _Td.VCPU, (RCX, RDX)),
}

_Leaf: TypeAlias = "Callable[[TdxModule, int, Gprs], int]"


def session_leaf(leaf: SeamcallLeaf) -> _Leaf | None:
    """Return the function of a leaf that only makes sense in a migration session, or None for another leaf."""
    row = _SESSION_LEAVES.get(leaf)
    if row is None:
        return None
    register, td, outputs = row
    allowed = ALLOWED[leaf]
    operand = Operand.RCX if register == RCX else Operand.RDX

    def check(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
        hpa = regs[register]
        for output in outputs:
            regs[output] = 0
        if td is _Td.VCPU:
            module.check_td(module.lock_tdvpr(hpa, operand, 1).tdr, allowed)
        elif td is _Td.EXCLUSIVE:
            module.check_td_locked(module.lock_tdr(hpa, operand, 1), allowed)
        elif td is _Td.STATE_EXCLUSIVE:
            module.check_td_exclusive(module.lock_tdr(hpa, operand), allowed)
        else:
            module.check_td(module.lock_tdr(hpa, operand), allowed)
        raise NotModelled(f"{leaf.name}: a migration session")

    return check


# Operands that several leaves share


def check_stream(stream: int) -> bool:
    """Check the stream (0) and command of STATE.IMMUTABLE (R10); tell whether it is to go on after an interrupt."""
    if stream & ~_MIGS_COMMAND_RESUME:
        raise LeafError(Status.OPERAND_INVALID, Operand.R10)
    return bool(stream)


def check_mbmd(module: TdxModule, hpa_and_size: int) -> None:
    """Check the HPA (bits 51:0) and size (63:52) of a migration bundle's metadata (R8)."""
    if hpa_and_size >> _HPA_AND_SIZE_SHIFT < MBMD_BYTES:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    module.check_shared_hpa(hpa_and_size & _HPA_AND_SIZE_HPA, MBMD_ALIGNMENT, Operand.R8)


def check_page_list(module: TdxModule, page_list: int, min_pages: int) -> None:
    """Check the HPA (bits 51:12) and last entry (63:55) of a list of pages (R9)."""
    if page_list >> _PAGE_LIST_LAST_SHIFT < min_pages - 1 or page_list & _PAGE_LIST_RESERVED:
        raise LeafError(Status.OPERAND_INVALID, Operand.R9)
    module.check_shared_hpa(page_list & _HPA, 4096, Operand.R9)

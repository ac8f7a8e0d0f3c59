"""Memory operands of TDCALLs: a GPA, checked and translated as the CPU would.

Spec: TDX Module Base Spec, "Guest-Side Address Translation".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.ept import HPA_MASK, LARGE, RWX, SUPPRESS_VE, page_of
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.event_injection import EventInjected, inject_ve
from sim_backend.tdx_module.metadata_td import TD_CTLS_PENDING_VE_DISABLE
from sim_backend.tdx_module.sept_states import SeptState, state_of
from sim_backend.tdx_module.td_exit import (
    EEQ_PENDING_EPT_VIOLATION,
    TdExit,
    ept_misconfiguration_exit,
    ept_violation_exit,
)
from sim_backend.tdx_module.td_vmcs import SHARED_EPTP
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.hw.gprs import Gprs
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdcs import Tdcs
    from sim_backend.tdx_module.tdvps import Tdvps

_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
_RESERVED_MEMORY_TYPES: Final = frozenset({2, 3, 7})
READ: Final = 0b001
READ_WRITE: Final = 0b011
ACCEPTABLE: Final = frozenset({SeptState.PENDING, SeptState.PENDING_EXPORTED_DIRTY})
"""States of a page that waits for TDG.MEM.PAGE.ACCEPT."""


def is_gpa_valid(tdcs: Tdcs, gpa: int, *, private_only: bool) -> bool:
    """Tell whether `gpa` is within GPAW, and private where it has to be."""
    if private_only:
        return not gpa >> tdcs.shared_bit
    return not gpa >> (52 if tdcs.gpaw else 48)


class _Misconfigured(Exception):  # noqa: N818
    """The shared EPT holds an impossible entry."""


def _walk(module: TdxModule, tdcs: Tdcs, root: int, gpa: int, access: int, *, shared: bool) -> tuple[int, int, int]:
    """Return the entry where the walk ends, its level, and the rights of the path.

    Unlike the CPU's walk this one stops at the first entry that lacks a right which the access needs.
    """
    q = module.q
    mask = HPA_MASK & ~module.hkid_mask
    table, level, rights = root, tdcs.pwl, RWX
    while True:
        index = (table >> 3) + (gpa >> 12 + 9 * level & 0x1FF)
        if index >= len(q):
            raise _Misconfigured
        entry = q[index]
        rights &= entry
        leaf = level == 0 or bool(entry & LARGE)
        if shared:
            _check_shared_entry(module, entry, level, leaf=leaf)
        if not entry & RWX or entry & access != access or leaf:
            return entry, level, rights
        table = entry & mask
        level -= 1


def _check_shared_entry(module: TdxModule, entry: int, level: int, *, leaf: bool) -> None:
    if entry & 0b11 == 0b10:
        raise _Misconfigured
    if not entry & RWX:
        return
    if leaf and level <= 2:
        low_address_bits = HPA_MASK & (1 << 12 + 9 * level) - 1
        if entry & low_address_bits or entry >> 3 & 7 in _RESERVED_MEMORY_TYPES:
            raise _Misconfigured
    elif entry & 0xF8:
        raise _Misconfigured
    else:
        _check_shared_page(module, entry & HPA_MASK)


def _check_shared_page(module: TdxModule, hpa: int) -> None:
    try:
        module.check_shared_hpa(hpa, 4096, 0)
    except LeafError:
        raise _Misconfigured from None


def translate(
    module: TdxModule,
    lp: int,
    regs: Gprs,
    tdvps: Tdvps,
    gpa: int,
    access: int,
    operand: int,
    *,
    private_only: bool,
) -> int:
    """Return the HPA of `gpa` for an access of READ or READ_WRITE.

    Raise OPERAND_INVALID naming `operand` for a GPA that is no such address, `EventInjected` after a #VE on a pending
    page, `TdExit` after an EPT violation or misconfiguration; in both cases the TDCALL runs again later.
    """
    tdcs = tdvps.tdr.tdcs
    if not is_gpa_valid(tdcs, gpa, private_only=private_only):
        raise LeafError(Status.OPERAND_INVALID, operand)
    shared = bool(gpa >> tdcs.shared_bit)
    root = tdvps.vmcs[SHARED_EPTP] & HPA_MASK & ~module.hkid_mask if shared else tdcs.sept_root
    try:
        entry, level, rights = _walk(module, tdcs, root, gpa, access, shared=shared)
        if entry & access == access:
            hpa = page_of(entry, level, gpa)
            if shared:
                _check_shared_page(module, hpa)
            return hpa & ~module.hkid_mask | gpa & 0xFFF
    except _Misconfigured:
        ept_misconfiguration_exit(module, lp, regs, tdvps, gpa)
        raise TdExit from None

    qualification = access & ~rights | rights << 3
    extended = 0
    if shared:
        deliver_ve = (not entry & RWX or bool(entry & LARGE) or level == 0) and not entry & SUPPRESS_VE
    else:
        deliver_ve = state_of(entry) in ACCEPTABLE
        if deliver_ve and tdcs.td_ctls & TD_CTLS_PENDING_VE_DISABLE:
            deliver_ve, extended = False, EEQ_PENDING_EPT_VIOLATION
    if deliver_ve:
        inject_ve(tdvps, _EPT_VIOLATION, qualification, gpa)
        raise EventInjected
    ept_violation_exit(module, lp, regs, tdvps, gpa, qualification, extended)
    raise TdExit

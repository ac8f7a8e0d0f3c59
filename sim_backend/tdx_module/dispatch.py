"""SEAMCALL dispatch: RAX, the module's state, then the leaf. The only place that catches `LeafError`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.hw.gprs import RAX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.migration import session_leaf
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.vmexit import dispatch as vmexit_dispatch
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_H = SeamcallLeaf

Leaf: TypeAlias = "Callable[[TdxModule, int, Gprs], int]"
"""A leaf: (module, LP, registers) -> completion status, or `TD_ENTERED`. RAX still holds the version."""

TD_ENTERED: Final = -1
"""What TDH.VP.ENTER returns when the LP is in the TD."""

_SYS_SHUTDOWN: Final = 4
_SYS_READY: Final = 3
_RAX_RESERVED: Final = ~0xFF_FFFF
_INVALID_RAX: Final = Status.OPERAND_INVALID << 32 | Operand.RAX

VERSIONED: Final = frozenset({
    _H.TDH_MEM_PAGE_PROMOTE, _H.TDH_MEM_SEPT_ADD, _H.TDH_MEM_SEPT_REMOVE, _H.TDH_MNG_RD, _H.TDH_VP_RD,
})  # fmt: skip
"""Leaves that accept a version above 0 (each says which)."""

BEFORE_READY: Final = frozenset({
    _H.TDH_SYS_KEY_CONFIG, _H.TDH_SYS_INFO, _H.TDH_SYS_INIT, _H.TDH_SYS_RD, _H.TDH_SYS_LP_INIT, _H.TDH_SYS_RDALL,
    _H.TDH_SYS_LP_SHUTDOWN, _H.TDH_SYS_CONFIG, _H.TDH_SYS_UPDATE,
})  # fmt: skip
"""Leaves that need no initialised module."""


NOT_DISPATCHED: Final = frozenset({_H.TDH_MEM_SEPT_WR})
"""Leaves that the ABI defines and this release refuses like an undefined number."""


def _load(leaf: _H) -> Leaf | None:
    """Return the function of a leaf: it is named as the leaf, and so is its file. None: not modelled."""
    name = leaf.name.lower()
    path = f"sim_backend.tdx_module.seamcall.{name}"
    try:
        found: Leaf = getattr(import_module(path), name)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return session_leaf(leaf)
    return found


LEAVES: Final[dict[int, Leaf | None]] = {int(leaf): _load(leaf) for leaf in _H if leaf not in NOT_DISPATCHED}
"""Leaf number -> function."""


def seamcall(module: TdxModule, lp: int, regs: Gprs) -> bool:
    """Run the leaf that RAX names on LP `lp`; see `TdxModule.seamcall`."""
    rax = regs[RAX]
    leaf = rax & 0xFFFF
    if rax > 0xFFFF and (rax & _RAX_RESERVED or not _accepts_version(module, leaf)):
        regs[RAX] = _INVALID_RAX
        return False
    state = module.sys_state
    if state != _SYS_READY:
        if state == _SYS_SHUTDOWN and leaf != _H.TDH_SYS_LP_SHUTDOWN:
            regs[RAX] = Status.SYS_SHUTDOWN << 32
            return False
        if state != _SYS_SHUTDOWN and leaf not in BEFORE_READY:
            regs[RAX] = Status.SYS_NOT_READY << 32
            return False
    function = LEAVES.get(leaf)
    if function is None:
        if leaf in LEAVES:
            raise NotModelled(_H(leaf).name)
        regs[RAX] = _INVALID_RAX
        return False
    held = module.pamt.held
    try:
        result = function(module, lp, regs)
    except LeafError as error:
        regs[RAX] = error.rax
        return False
    finally:
        if held:
            module.pamt.release()
    if result == TD_ENTERED:
        return True
    regs[RAX] = result
    if result >> 32 in module.statuses:
        rename_status(module, regs)
    return False


def rename_status(module: TdxModule, regs: Gprs) -> None:
    """Give the status in RAX the number that the profile has for it, where it is not that of 1.5.01."""
    rax = regs[RAX]
    status = module.statuses.get(rax >> 32)
    if status is not None:
        regs[RAX] = status << 32 | rax & 0xFFFF_FFFF


def _accepts_version(module: TdxModule, leaf: int) -> bool:
    return leaf in VERSIONED or (leaf == _H.TDH_VP_INIT and module.profile.vp_init_version1)


def vmexit(module: TdxModule, lp: int, regs: Gprs) -> bool:
    """Handle a VM exit of the TD that LP `lp` runs; see `TdxModule.vmexit`."""
    left = vmexit_dispatch.vmexit(module, lp, regs)
    if left and regs[RAX] >> 32 in module.statuses:
        rename_status(module, regs)
    return left

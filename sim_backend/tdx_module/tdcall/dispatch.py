"""TDCALL dispatch: RAX of the guest, then the leaf; and the patience with a host that holds a lock."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.hw.gprs import RAX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.event_injection import EventInjected, inject_gp
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.outcome import EXITED, INTERRUPTED, Outcome
from sim_backend.tdx_module.td_exit import TdExit, async_exit
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps


TdcallLeafFunction: TypeAlias = "Callable[[TdxModule, int, Gprs, Tdvps], int]"
"""A leaf: (module, LP, the host's registers, vCPU) -> completion status."""

_INVALID_RAX: Final = Status.OPERAND_INVALID << 32 | Operand.RAX
_BUSY_HOST_PRIORITY: Final = int(Status.OPERAND_BUSY_HOST_PRIORITY)
_BUSY: Final = Status.OPERAND_BUSY << 32
_RAX_RESERVED: Final = ~0xFF_FFFF
_TD_EXIT: Final = Outcome.TD_EXIT


def _load(leaf: TdcallLeaf) -> TdcallLeafFunction | None:
    name = leaf.name.lower()
    try:
        found: TdcallLeafFunction = getattr(import_module(f"sim_backend.tdx_module.tdcall.{name}"), name)
    except ModuleNotFoundError:
        return None
    return found


LEAVES: Final[dict[int, TdcallLeafFunction | None]] = {}


def tdcall(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Execute TDCALL for the vCPU that LP `lp` runs; `regs` are the host's registers, set on a TD exit."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    if not cpu.in_64bit_mode():
        inject_gp(tdvps)
        return Outcome.RESUME
    gprs = cpu.gprs
    rax = gprs[RAX]
    leaf = rax & 0xFFFF
    if rax > 0xFFFF and (rax & _RAX_RESERVED or leaf != TdcallLeaf.TDG_VM_RD):
        status = _INVALID_RAX
    else:
        function = LEAVES.get(leaf)
        if function is None:
            if leaf in LEAVES:
                raise NotModelled(TdcallLeaf(leaf).name)
            status = _INVALID_RAX
        else:
            try:
                status = function(module, lp, regs, tdvps)
            except LeafError as error:
                status = error.rax
            except EventInjected:
                return Outcome.RESUME
            except TdExit:
                return Outcome.TD_EXIT
            if status == EXITED:
                return _TD_EXIT
            if status == INTERRUPTED:
                tdvps.hp_lock_busy = False
                return Outcome.RESUME
    if status >> 32 == _BUSY_HOST_PRIORITY:
        status = _BUSY | status & 0xFFFF_FFFF  # what guests older than host priority know
        if _is_out_of_patience(module, tdvps):
            gprs[RAX] = status
            async_exit(module, lp, regs, tdvps, 0, status=Status.HOST_PRIORITY_BUSY_TIMEOUT, with_reason=False)
            return Outcome.TD_EXIT
    else:
        tdvps.hp_lock_busy = False
    gprs[RAX] = status
    return Outcome.COMPLETED


def _is_out_of_patience(module: TdxModule, tdvps: Tdvps) -> bool:
    """Tell whether the guest has yielded to the host for HP_LOCK_TIMEOUT; start the clock on the first time."""
    now = module.platform.rdtsc()
    if not tdvps.hp_lock_busy:
        tdvps.hp_lock_busy = True
        tdvps.hp_lock_busy_start = now
        return False
    if now - tdvps.hp_lock_busy_start < tdvps.tdr.tdcs.hp_lock_timeout:
        return False
    tdvps.hp_lock_busy = False
    return True


LEAVES.update({leaf: _load(leaf) for leaf in TdcallLeaf})

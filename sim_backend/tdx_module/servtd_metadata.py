"""What TDG.SERVTD.RD and TDG.SERVTD.WR have in common: finding the target TD that a binding handle names.

Spec: TDX Module Base Spec, "Service TDs"; ABI Reference, TDG.SERVTD.RD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from sim_backend.hw.gprs import R10, R11, R12, R13, RAX, RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.locks import GuestTry
from sim_backend.tdx_module.servtd import MAX_SERVTDS, BindingState, binding, break_handle, guest_lock_tdr
from sim_backend.tdx_module.td_exit import TdExit, async_exit
from sim_backend.tdx_module.tdcall.tdg_mr_rtmr_extend import BUSY_STATUS
from sim_backend.tdx_module.tdcs import MIN_TDCS_PAGES
from sim_backend.tdx_module.tdr import LifecycleState
from sim_backend.tdx_module.tdreport import tee_info_hash
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.locks import HostPriorityLock
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdr import Tdr
    from sim_backend.tdx_module.tdvps import Tdvps

_UUID: Final = (R10, R11, R12, R13)


def _take(lock: HostPriorityLock, operand: int) -> None:
    attempt = lock.guest_try_shared()
    if attempt != GuestTry.ACQUIRED:
        raise LeafError(BUSY_STATUS[attempt], operand)


def _lock_target(module: TdxModule, tdr_hpa: int, allowed: int) -> Tdr:
    tdr = guest_lock_tdr(module, tdr_hpa)
    if tdr.fatal:
        raise LeafError(Status.TD_FATAL)
    if tdr.lifecycle_state != LifecycleState.KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
    if tdr.num_tdcx < MIN_TDCS_PAGES:
        raise LeafError(Status.TDCS_NOT_ALLOCATED)
    _take(tdr.tdcs.op_state_lock, Operand.OP_STATE)
    if not allowed >> tdr.tdcs.op_state & 1:
        raise LeafError(Status.OP_STATE_INCORRECT)
    return tdr


def target_td(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, allowed: int) -> Tdr:
    """Return the TD that the binding handle in the guest's RCX names, in a state of the mask `allowed`.

    Raise `LeafError` for what the guest can mend. What only the host can mend, it is shown in a TD exit (CROSS_TD_TRAP
    with the status in RDX and the target's TDR in R8): `TdExit`.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    own_uuid = tdvps.tdr.td_uuid
    tdr_hpa, slot = break_handle(gprs[RCX], own_uuid)
    if slot >= MAX_SERVTDS:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    pamt = module.pamt
    try:
        try:
            target = _lock_target(module, tdr_hpa, allowed)
        except LeafError as error:
            if error.rax >> 32 == Status.OPERAND_BUSY:
                raise
            _cross_td_trap(module, lp, regs, tdvps, error.rax, tdr_hpa)
        _check_uuid(gprs, target)
        _take(target.tdcs.servtd_bindings_lock, Operand.SERVTD_BINDINGS)
        bound = binding(target.tdcs)
        if bound.state is not BindingState.BOUND:
            _cross_td_trap(module, lp, regs, tdvps, Status.SERVTD_NOT_BOUND << 32 | slot, tdr_hpa)
        if bound.uuid != own_uuid:
            _cross_td_trap(module, lp, regs, tdvps, Status.SERVTD_UUID_MISMATCH << 32, tdr_hpa)
        _take(tdvps.tdr.tdcs.rtmr_lock, Operand.RTMR)
        if bound.info_hash != tee_info_hash(tdvps.tdr.tdcs, bound.ignored_tdinfo):
            _cross_td_trap(module, lp, regs, tdvps, Status.SERVTD_INFO_HASH_MISMATCH << 32, tdr_hpa)
    finally:
        pamt.release()
    return target


def _check_uuid(gprs: Gprs, target: Tdr) -> None:
    """Check R10-R13. A guest bound before an import learns the new UUID of its target."""
    uuid = [gprs[register] for register in _UUID]
    if uuid == target.td_uuid:
        return
    if uuid != target.tdcs.pre_import_uuid:
        raise LeafError(Status.TARGET_UUID_MISMATCH)
    for register, value in zip(_UUID, target.td_uuid, strict=True):
        gprs[register] = value
    raise LeafError(Status.TARGET_UUID_UPDATED)


def _cross_td_trap(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, status: int, target_hpa: int) -> NoReturn:
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    tdvps.cpu.gprs[RAX] = status
    async_exit(
        module, lp, regs, tdvps, 0, status=Status.CROSS_TD_TRAP, extended=status, gpa=target_hpa, with_reason=False
    )
    raise TdExit

"""TDH.SERVTD.BIND."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED, ALLOWED_SERVICE_TD, OpState
from sim_backend.tdx_module.servtd import (
    ATTR_INSTANCE_BINDING,
    Binding,
    BindingState,
    binding,
    check_operands,
    ignored_tdinfo,
    make_handle,
)
from sim_backend.tdx_module.tdreport import tee_info_hash
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_SERVTD_BIND]
_BEFORE_FINALIZE: Final = (OpState.UNINITIALIZED, OpState.INITIALIZED)


def tdh_servtd_bind(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Bind a service TD to a target TD.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the target TD's TDR page
    RDX     in  HPA of the service TD's TDR page
    R8      in  slot: 0
    R9      in  SERVTD_TYPE: 0, a migration TD
    R10     in  SERVTD_ATTR
    RCX     out binding handle; 0 on an error
    R10-R13 out TD_UUID of the target; 0 on an error
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SERVTD.BIND.
    """
    target_hpa, servtd_hpa, slot, servtd_type, attributes = regs[RCX], regs[RDX], regs[R8], regs[R9], regs[R10]
    regs[RCX] = regs[R10] = regs[R11] = regs[R12] = regs[R13] = 0

    # 1. RCX and RDX are TDR pages of different TDs that this LP can lock shared, both in a suitable state.
    if target_hpa == servtd_hpa:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    target = module.lock_tdr(target_hpa, Operand.RCX)
    module.check_td(target, _ALLOWED)
    service = module.lock_tdr(servtd_hpa, Operand.RDX)
    module.check_td(service, ALLOWED_SERVICE_TD)

    # 2. R8, R9 and R10 are valid; nobody else uses the table or changes the service TD's RTMRs.
    check_operands(slot, servtd_type, attributes)
    tdcs = target.tdcs
    if not tdcs.servtd_bindings_lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.SERVTD_BINDINGS)
    if not service.tdcs.rtmr_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.RTMR)
    info_hash = tee_info_hash(service.tdcs, ignored_tdinfo(attributes))

    # 3. A first binding comes before the target is finalised; a later one is to a TD like the first.
    bound = binding(tdcs)
    first = not bound.is_bound
    if first:
        if tdcs.op_state not in _BEFORE_FINALIZE:
            raise LeafError(Status.OP_STATE_INCORRECT)
    else:
        _check_rebinding(bound, servtd_type, attributes, service.td_uuid, info_hash)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if first:
        tdcs.servtd_num += 1
    bound.state = BindingState.BOUND
    bound.type = servtd_type
    bound.attributes = attributes
    bound.info_hash = info_hash
    bound.uuid = list(service.td_uuid)
    regs[RCX] = make_handle(bound.uuid, target_hpa, slot)
    regs[R10], regs[R11], regs[R12], regs[R13] = target.td_uuid
    return 0


def _check_rebinding(bound: Binding, servtd_type: int, attributes: int, uuid: list[int], info_hash: bytes) -> None:
    if bound.type != servtd_type:
        raise LeafError(Status.SERVTD_TYPE_MISMATCH)
    if bound.attributes != attributes:
        raise LeafError(Status.SERVTD_ATTR_MISMATCH)
    if bound.state is BindingState.BOUND and attributes & ATTR_INSTANCE_BINDING:
        if bound.uuid != uuid:
            raise LeafError(Status.SERVTD_UUID_MISMATCH)
    elif bound.info_hash != info_hash:
        raise LeafError(Status.SERVTD_INFO_HASH_MISMATCH)

"""TDH.SERVTD.PREBIND."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.servtd import INFO_HASH_BYTES, BindingState, binding, check_operands
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_SERVTD_PREBIND]
_INFO_HASH_ALIGNMENT: Final = 64


def tdh_servtd_prebind(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Say which service TD may be bound to a target TD later.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the target TD's TDR page
    RDX     in  HPA of the service TD's TEE_INFO_HASH, 64-byte-aligned
    R8      in  slot: 0
    R9      in  SERVTD_TYPE: 0, a migration TD
    R10     in  SERVTD_ATTR
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SERVTD.PREBIND.
    """
    # 1. RCX is a TDR page that this LP can lock shared, of a TD that is not finalised.
    target = module.lock_tdr(regs[RCX], Operand.RCX)
    module.check_td(target, _ALLOWED)

    # 2. RDX, R8, R9 and R10 are valid; nobody else uses the table.
    hash_hpa = regs[RDX]
    module.check_shared_hpa(hash_hpa, _INFO_HASH_ALIGNMENT, Operand.RDX)
    check_operands(regs[R8], regs[R9], regs[R10])
    tdcs = target.tdcs
    if not tdcs.servtd_bindings_lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.SERVTD_BINDINGS)

    # 3. The slot is not bound.
    slot = binding(tdcs)
    if slot.state is BindingState.BOUND:
        raise LeafError(Status.SERVTD_BOUND)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if not slot.is_bound:
        tdcs.servtd_num += 1
    slot.state = BindingState.PRE_BOUND
    slot.type = regs[R9]
    slot.attributes = regs[R10]
    slot.info_hash = module.read_shared(hash_hpa, INFO_HASH_BYTES)
    return 0

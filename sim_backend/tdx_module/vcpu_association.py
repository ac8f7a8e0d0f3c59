"""Which LP a vCPU belongs to: the LP that last touched its VMCS, until TDH.VP.FLUSH.

Spec: TDX Module Base Spec, "VCPU Association with LPs".
"""

from typing import Final

from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata_vp import set_field
from sim_backend.tdx_module.tdvps import NO_LP, Tdvps, VcpuState
from uapi_ctypes.tdx_status import Status

_READY: Final = int(VcpuState.READY)
_DISABLED: Final = int(VcpuState.DISABLED)


def associate(tdvps: Tdvps, lp: int, *, allow_disabled: bool = False) -> bool:
    """Associate a READY vCPU with LP `lp`; return whether it was associated with none before.

    Raise VCPU_STATE_INCORRECT, or VCPU_ASSOCIATED when it belongs to another LP.
    """
    state = tdvps.vcpu_state
    if state != _READY and not (allow_disabled and state == _DISABLED):
        raise LeafError(Status.VCPU_STATE_INCORRECT)
    if tdvps.assoc_lpid == lp:
        return False
    if tdvps.assoc_lpid != NO_LP:
        raise LeafError(Status.VCPU_ASSOCIATED)
    tdvps.assoc_lpid = lp
    tdvps.tdr.tdcs.num_assoc_vcpus += 1
    for vm in range(4):
        set_field(tdvps, "LP_DEPENDENT_HPA_UPDATED", 0, vm)
        set_field(tdvps, "VM_LAUNCHED", 0, vm)
    return True

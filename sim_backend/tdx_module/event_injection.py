"""Events that the module delivers to a guest instead of completing its instruction.

Spec: TDX Module Base Spec, "Exception Handling"; Intel SDM Vol. 3, "Event Injection".
"""

from typing import Final

from sim_backend.tdx_module.td_vmcs import (
    ENTRY_EXCEPTION_ERROR,
    ENTRY_INTERRUPTION_INFO,
    EXCEPTION_BITMAP,
    PF_ERROR_CODE_MASK,
    PF_ERROR_CODE_MATCH,
)
from sim_backend.tdx_module.tdvps import Tdvps

VE_INTERRUPTION_INFO: Final = 0x8000_0314
GP_INTERRUPTION_INFO: Final = 0x8000_0B0D
UD_INTERRUPTION_INFO: Final = 0x8000_0306
PF_INTERRUPTION_INFO: Final = 0x8000_0B0E
DF_INTERRUPTION_INFO: Final = 0x8000_0B08
NMI_INTERRUPTION_INFO: Final = 0x8000_0202
_TYPE: Final = 7 << 8
_HARDWARE_EXCEPTION: Final = 3 << 8
VALID: Final = 1 << 31
"""In interruption information: there is an event."""
_VECTOR_PF: Final = 14
_RFLAGS_RF: Final = 1 << 16


class EventInjected(Exception):  # noqa: N818 - leaves a TDCALL leaf, whose TDCALL is not completed
    """An event will be delivered to the guest instead."""


def _inject(tdvps: Tdvps, info: int, error_code: int | None) -> None:
    """Deliver an event at the next entry. The error-code field of the VMCS keeps its value when none is written."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    if error_code is None:
        error_code = tdvps.vmcs.get(ENTRY_EXCEPTION_ERROR, 0)
    else:
        tdvps.vmcs[ENTRY_EXCEPTION_ERROR] = error_code
    tdvps.vmcs[ENTRY_INTERRUPTION_INFO] = info
    cpu.inject(info, error_code, 0)


def is_intercepted(tdvps: Tdvps) -> bool:
    """Tell whether the event that waits for the next entry is an exception that a debugger wants to see first.

    For #PF the module compares the error code of the last VM exit, not that of the event (Intel SDM Vol. 3,
    "Exception Bitmap").
    """
    vmcs = tdvps.vmcs
    info = vmcs.get(ENTRY_INTERRUPTION_INFO, 0)
    if not info & VALID or info & _TYPE != _HARDWARE_EXCEPTION:
        return False
    vector = info & 0xFF
    if not vmcs[EXCEPTION_BITMAP] >> vector & 1:
        return False
    if vector != _VECTOR_PF:
        return True
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    code = tdvps.cpu.exit.interruption_error
    return code & vmcs.get(PF_ERROR_CODE_MASK, 0) == vmcs.get(PF_ERROR_CODE_MATCH, 0)


def entry_is_over(tdvps: Tdvps) -> None:
    """Mark the event of the last entry, if there was one, as delivered, as the CPU does at each VM exit."""
    tdvps.vmcs[ENTRY_INTERRUPTION_INFO] &= ~VALID


def _set_rf(tdvps: Tdvps) -> None:
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    cpu.rflags |= _RFLAGS_RF


def inject_gp(tdvps: Tdvps) -> None:
    """Deliver #GP(0)."""
    _set_rf(tdvps)
    _inject(tdvps, GP_INTERRUPTION_INFO, 0)


def inject_ud(tdvps: Tdvps) -> None:
    """Deliver #UD."""
    _set_rf(tdvps)
    _inject(tdvps, UD_INTERRUPTION_INFO, None)


def inject_pf(tdvps: Tdvps, gla: int, error_code: int) -> None:
    """Deliver #PF at `gla`."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    state = cpu.get_state()
    state.cr2 = gla
    cpu.set_state(state)
    _set_rf(tdvps)
    _inject(tdvps, PF_INTERRUPTION_INFO, error_code)


def inject_nmi(tdvps: Tdvps) -> None:
    """Deliver an NMI."""
    _inject(tdvps, NMI_INTERRUPTION_INFO, None)


def inject_ve(tdvps: Tdvps, reason: int, qualification: int = 0, gpa: int = 0, gla: int = 0) -> None:
    """Deliver #VE with this information, or #DF when the guest has not read the last one."""
    ve_info = tdvps.ve_info
    _set_rf(tdvps)
    if ve_info.valid:
        _inject(tdvps, DF_INTERRUPTION_INFO, 0)
        return
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    ve_info.set(reason, qualification, gla, gpa)
    ve_info.instruction_length = cpu.exit.instruction_length
    ve_info.instruction_information = cpu.exit.instruction_info
    _inject(tdvps, VE_INTERRUPTION_INFO, None)

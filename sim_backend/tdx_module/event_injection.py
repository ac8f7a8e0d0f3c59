"""Events that the module delivers to a guest instead of completing its instruction.

Spec: TDX Module Base Spec, "Exception Handling"; Intel SDM Vol. 3, "Event Injection".
"""

from typing import Final

from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.td_vmcs import ENTRY_EXCEPTION_ERROR, EXCEPTION_BITMAP
from sim_backend.tdx_module.tdvps import Tdvps

VE_INTERRUPTION_INFO: Final = 0x8000_0314
GP_INTERRUPTION_INFO: Final = 0x8000_0B0D
UD_INTERRUPTION_INFO: Final = 0x8000_0306
PF_INTERRUPTION_INFO: Final = 0x8000_0B0E
DF_INTERRUPTION_INFO: Final = 0x8000_0B08
NMI_INTERRUPTION_INFO: Final = 0x8000_0202
_TYPE: Final = 7 << 8
_HARDWARE_EXCEPTION: Final = 3 << 8
_VECTOR: Final = 0x1F
_RFLAGS_RF: Final = 1 << 16


class EventInjected(Exception):  # noqa: N818 - leaves a TDCALL leaf, whose TDCALL is not completed
    """An event will be delivered to the guest instead."""


def _inject(tdvps: Tdvps, info: int, error_code: int | None) -> None:
    """Deliver an event at the next entry. The error-code field of the VMCS keeps its value when none is written."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    if info & _TYPE == _HARDWARE_EXCEPTION and tdvps.vmcs[EXCEPTION_BITMAP] >> (info & _VECTOR) & 1:
        raise NotModelled(f"a debugger that intercepts injected exceptions (vector {info & _VECTOR})")
    if error_code is None:
        error_code = tdvps.vmcs.get(ENTRY_EXCEPTION_ERROR, 0)
    else:
        tdvps.vmcs[ENTRY_EXCEPTION_ERROR] = error_code
    cpu.inject(info, error_code, 0)


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

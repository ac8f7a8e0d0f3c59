"""VM exits for events, and instructions that simply fault in a TD.

Spec: TDX Module Base Spec, "TD VM Exits"; "Exception Handling".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module import nmi
from sim_backend.tdx_module.event_injection import inject_gp, inject_ud, inject_ve
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.td_exit import async_exit
from sim_backend.tdx_module.td_params import ATTR_DEBUG, ATTR_PERFMON
from sim_backend.tdx_module.td_vmcs import INTERRUPTIBILITY
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_TYPE_MASK: Final = 7 << 8
_TYPE_NMI: Final = 2 << 8
_VECTOR_MC: Final = 18
_QUALIFICATION_MSMI: Final = 1 << 0
_NOTIFY_CONTEXT_INVALID: Final = 1 << 0
_NOTIFY_NMI_UNBLOCKED: Final = 1 << 12
_BLOCKING_BY_NMI: Final = 1 << 3


def virtualization_exception(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Let the guest handle the instruction itself: #VE."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    inject_ve(tdvps, tdvps.cpu.exit.reason, tdvps.cpu.exit.qualification)
    return Outcome.RESUME


def ud_fault(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Refuse an instruction that a TD does not have: #UD."""
    inject_ud(tdvps)
    return Outcome.RESUME


def gp_fault(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Refuse an instruction with #GP(0)."""
    inject_gp(tdvps)
    return Outcome.RESUME


def plain_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Hand the exit to the host with its qualification."""
    return _exit(module, lp, regs, tdvps)


def _exit(
    module: TdxModule,
    lp: int,
    regs: Gprs,
    tdvps: Tdvps,
    status: int = Status.SUCCESS,
    *,
    interruption: bool = False,
) -> Outcome:
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    exit_ = tdvps.cpu.exit
    async_exit(
        module,
        lp,
        regs,
        tdvps,
        exit_.reason,
        status=status,
        qualification=exit_.qualification,
        interruption=exit_.interruption_info if interruption else 0,
    )
    return Outcome.TD_EXIT


def external_interrupt(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave for the host's interrupt."""
    return _exit(module, lp, regs, tdvps, interruption=True)


def triple_fault(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave with the vCPU disabled."""
    return _exit(module, lp, regs, tdvps, Status.NON_RECOVERABLE_VCPU)


def other_smi(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave for an SMI; one that stands for a machine check makes the TD unusable."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    machine_check = tdvps.cpu.exit.qualification & _QUALIFICATION_MSMI
    status = Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE if machine_check else Status.SUCCESS
    return _exit(module, lp, regs, tdvps, status, interruption=True)


def notify(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave because no instruction completed for the notify window."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    qualification = tdvps.cpu.exit.qualification
    if qualification & _NOTIFY_NMI_UNBLOCKED:
        tdvps.vmcs[INTERRUPTIBILITY] = tdvps.vmcs.get(INTERRUPTIBILITY, 0) | _BLOCKING_BY_NMI
    invalid = qualification & _NOTIFY_CONTEXT_INVALID
    return _exit(module, lp, regs, tdvps, Status.NON_RECOVERABLE_TD if invalid else Status.SUCCESS)


def exception_or_nmi(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave for the host's NMI; a machine check makes the TD unusable; a debugger may want other exceptions."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    info = tdvps.cpu.exit.interruption_info
    if info & _TYPE_MASK == _TYPE_NMI:
        return _exit(module, lp, regs, tdvps, interruption=True)
    if info & 0xFF == _VECTOR_MC:
        return _exit(module, lp, regs, tdvps, Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE, interruption=True)
    if tdvps.tdr.tdcs.attributes & ATTR_DEBUG:
        return _exit(module, lp, regs, tdvps, interruption=True)
    raise NotModelled(f"the module's shutdown on an unexpected exception exit ({info:#x})")


def nmi_window(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Deliver the NMI that the host asked for."""
    pending = tdvps.pend_nmi and not tdvps.ve_info.valid
    nmi.deliver(tdvps)
    return Outcome.RESUME if pending else Outcome.COMPLETED


def rdpmc(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Refuse RDPMC in a TD without ATTRIBUTES.PERFMON."""
    tdcs = tdvps.tdr.tdcs
    if not tdcs.attributes & ATTR_PERFMON:
        inject_gp(tdvps)
        return Outcome.RESUME
    if tdcs.attributes & ATTR_DEBUG:
        return _exit(module, lp, regs, tdvps)
    raise NotModelled("performance counters of a TD")


def unexpected_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave on an exit that only a debugger can have asked for; in a production TD it is fatal."""
    debug = tdvps.tdr.tdcs.attributes & ATTR_DEBUG
    return _exit(module, lp, regs, tdvps, Status.SUCCESS if debug else Status.NON_RECOVERABLE_TD)

"""What the module does with each VM exit of a TD: resume the guest, deliver an event, or leave to the host.

Spec: TDX Module Base Spec, "TD VM Exits".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module import stepping
from sim_backend.tdx_module.event_injection import VALID, EventInjected, entry_is_over, is_intercepted
from sim_backend.tdx_module.nmi import arm_window
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.td_exit import BUS_LOCK_PREEMPTED, TdExit, advance_rip, async_exit
from sim_backend.tdx_module.td_params import ATTR_DEBUG
from sim_backend.tdx_module.td_vmcs import ENTRY_INTERRUPTION_INFO
from sim_backend.tdx_module.tdcall.dispatch import tdcall
from sim_backend.tdx_module.vmexit.cpuid_exit import cpuid_exit
from sim_backend.tdx_module.vmexit.cr_access_exit import cr_access_exit
from sim_backend.tdx_module.vmexit.ept_exits import ept_misconfiguration, ept_violation
from sim_backend.tdx_module.vmexit.event_exits import (
    exception_or_nmi,
    external_interrupt,
    gp_fault,
    nmi_window,
    notify,
    other_smi,
    plain_exit,
    rdpmc,
    triple_fault,
    ud_fault,
    unexpected_exit,
    virtualization_exception,
)
from sim_backend.tdx_module.vmexit.msr_exits import rdmsr_exit, wrmsr_exit
from sim_backend.tdx_module.vmexit.xsetbv_exit import xsetbv_exit
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

ExitHandler: TypeAlias = "Callable[[TdxModule, int, Gprs, Tdvps], Outcome]"
"""(module, LP, the host's registers, vCPU) -> outcome. May raise `TdExit` or `EventInjected` after the fact."""

# fmt: off
_R: Final = ExitReason
HANDLERS: Final[dict[int, ExitHandler]] = {
    _R.TDCALL: tdcall,
    _R.CPUID: cpuid_exit,
    _R.MSR_READ: rdmsr_exit,
    _R.MSR_WRITE: wrmsr_exit,
    _R.EPT_VIOLATION: ept_violation,
    _R.EPT_MISCONFIGURATION: ept_misconfiguration,
    _R.CR_ACCESS: cr_access_exit,
    _R.XSETBV: xsetbv_exit,
    _R.EXTERNAL_INTERRUPT: external_interrupt,
    _R.C_STATE_SMI: external_interrupt,
    _R.EXCEPTION_OR_NMI: exception_or_nmi,
    _R.TRIPLE_FAULT: triple_fault,
    _R.OTHER_SMI: other_smi,
    _R.NMI_WINDOW: nmi_window,
    _R.NOTIFY: notify,
    _R.RDPMC: rdpmc,
    **dict.fromkeys((_R.TASK_SWITCH, _R.BUS_LOCK, _R.INIT), plain_exit),
    **dict.fromkeys((
        _R.IO_INSTRUCTION, _R.HLT, _R.INVD, _R.VMCALL, _R.WBINVD, _R.MWAIT, _R.MONITOR, _R.PCONFIG, _R.APIC_WRITE,
    ), virtualization_exception),
    **dict.fromkeys((
        _R.GETSEC, _R.RSM, _R.VMCLEAR, _R.VMLAUNCH, _R.VMPTRLD, _R.VMPTRST, _R.VMREAD, _R.VMRESUME, _R.VMWRITE,
        _R.VMXOFF, _R.VMXON, _R.INVEPT, _R.INVVPID, _R.VMFUNC, _R.ENCLS, _R.ENCLV, _R.ENQCMDS, _R.SEAMCALL,
    ), ud_fault),
    _R.ENQCMD: gp_fault,
}
# fmt: on

_BASIC_REASON: Final = 0xFFFF
_ENTRY_FAILED: Final = 1 << 31
_TD_EXIT: Final = Outcome.TD_EXIT
_COMPLETED: Final = Outcome.COMPLETED


def vmexit(module: TdxModule, lp: int, regs: Gprs) -> bool:
    """Handle the VM exit of the vCPU that LP `lp` runs; see `TdxModule.vmexit`."""
    tdvps = module.running[lp]
    assert tdvps is not None, "only an LP in a TD has VM exits"
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    tdvps.last_exit_tsc = module.platform.rdtsc()
    reason = cpu.exit.reason
    if tdvps.tdr.fatal:
        # Another LP found the TD unusable meanwhile: leave without touching its memory.
        async_exit(
            module,
            lp,
            regs,
            tdvps,
            reason,
            status=Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
            qualification=cpu.exit.qualification,
            interruption=cpu.exit.interruption_info,
        )
        return True
    if tdvps.possibly_epf_stepping and cpu.rip != tdvps.rip_on_entry:
        stepping.reset(tdvps)
    if reason > _BASIC_REASON:
        if reason & BUS_LOCK_PREEMPTED:
            tdvps.bus_lock_preempted = True
        if reason & _ENTRY_FAILED:
            return _entry_failed(module, lp, regs, tdvps)
    if tdvps.vmcs.get(ENTRY_INTERRUPTION_INFO, 0) & VALID:
        entry_is_over(tdvps)
    try:
        outcome = HANDLERS.get(reason & _BASIC_REASON, unexpected_exit)(module, lp, regs, tdvps)
    except EventInjected:
        outcome = Outcome.RESUME
    except TdExit:
        return True
    if outcome == _TD_EXIT:
        return True
    if outcome == _COMPLETED:
        if tdvps.pend_nmi and not tdvps.ve_info.valid:
            arm_window(tdvps)
        advance_rip(tdvps)
    if tdvps.bus_lock_preempted:
        async_exit(module, lp, regs, tdvps, ExitReason.BUS_LOCK)
        return True
    return _exit_for_debugger(module, lp, regs, tdvps)


def _exit_for_debugger(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> bool:
    """Leave to the host if it debugs the TD and intercepts the exception that the guest is about to get.

    The exception stays pending: the next TDH.VP.ENTER delivers it.
    """
    if not tdvps.tdr.tdcs.attributes & ATTR_DEBUG or not is_intercepted(tdvps):
        return False
    async_exit(module, lp, regs, tdvps, ExitReason.EXCEPTION_OR_NMI, interruption=tdvps.vmcs[ENTRY_INTERRUPTION_INFO])
    return True


def _entry_failed(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> bool:
    """Leave because the CPU refused to enter the guest, which makes the TD unusable; a debugger may repair it."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    reason = tdvps.cpu.exit.reason
    basic = reason & _BASIC_REASON
    if basic == ExitReason.FAILED_ENTRY_MACHINE_CHECK:
        status = Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE
    elif basic == ExitReason.FAILED_ENTRY_GUEST_STATE:
        status = Status.SUCCESS if tdvps.tdr.tdcs.attributes & ATTR_DEBUG else Status.NON_RECOVERABLE_TD
    else:
        raise NotModelled(f"the module's shutdown on an unexpected VM-entry failure (reason {basic})")
    async_exit(module, lp, regs, tdvps, reason, status=status, qualification=tdvps.cpu.exit.qualification)
    return True

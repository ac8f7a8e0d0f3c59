"""TDH.VP.ENTER."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, Gprs
from sim_backend.tdx_module import stepping
from sim_backend.tdx_module.dispatch import TD_ENTERED
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.event_injection import inject_ve
from sim_backend.tdx_module.metadata_vp import set_field
from sim_backend.tdx_module.nmi import arm_window
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.seamcall.tdh_mng_init import IA32_MISC_ENABLE, MISC_ENABLE_BOOT_NT4
from sim_backend.tdx_module.tdcall.tdg_vp_vmcall import selected_registers
from sim_backend.tdx_module.tdvps import LastTdExit, Tdvps, VcpuState, needed_tdvps_pages
from sim_backend.tdx_module.vcpu_association import associate
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_ENTER]
_IA32_TSC_ADJUST: Final = 0x3B
_MISC_ENABLE_MONITOR_FSM: Final = 1 << 18
_TDVPR_MASK: Final = 0x000F_FFFF_FFFF_F000
_HOST_RECOVERABILITY_HINT: Final = 1 << 52
_RESUME_L1: Final = 1 << 53
_RESERVED: Final = ~(_TDVPR_MASK | _HOST_RECOVERABILITY_HINT | _RESUME_L1)
_STATUS_HINT: Final = 1 << 60
_ACTIVE: Final = int(VcpuState.ACTIVE)
_READY: Final = int(VcpuState.READY)
_ASYNC_TRAP: Final = int(LastTdExit.ASYNC_TRAP)
_ASYNC_FAULT: Final = int(LastTdExit.ASYNC_FAULT)
_TDVMCALL: Final = int(LastTdExit.TDVMCALL)
_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
_WRITE_QUALIFICATION: Final = 2


def tdh_vp_enter(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Enter a TD on a vCPU.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDVPR page | bit 52 HOST_RECOVERABILITY_HINT | bit 53 RESUME_L1
    RDX..R15    after a TDG.VP.VMCALL: what the guest's RCX selected is passed to it
    ======= === ============================================================

    Output operands come with the TD exit, see td_exit.py.

    Spec: TDX Module ABI Reference, TDH.VP.ENTER.
    """
    rcx = regs[RCX]
    platform = module.platform

    # 1. CPUID is not limited to the leaves of Windows NT 4; RCX has no reserved bits.
    msrs = platform.msrs_of(lp)
    misc_enable = msrs.get(IA32_MISC_ENABLE, 0)
    if misc_enable & MISC_ENABLE_BOOT_NT4:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    if rcx & _RESERVED:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 2. RCX is a TDVPR page, of a TD that may run; the TDVPS is complete.
    tdvps = module.lock_tdvpr(rcx & _TDVPR_MASK, Operand.RCX)
    tdr = tdvps.tdr
    module.check_td(tdr, _ALLOWED)
    tdcs = tdr.tdcs
    if tdvps.num_tdvps_pages < needed_tdvps_pages(tdcs.num_l2_vms):
        raise LeafError(Status.TDCX_NUM_INCORRECT)

    # 3. The vCPU is ready and does not belong to another LP.
    newly_associated = associate(tdvps, lp)

    # 4. The hints fit the last TD exit.
    if rcx & _HOST_RECOVERABILITY_HINT and tdvps.last_td_exit != _ASYNC_TRAP:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if rcx & _RESUME_L1 and not tdvps.curr_vm:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 5. Time has not been turned back, and MONITOR works if the TD has it.
    if msrs.get(_IA32_TSC_ADJUST, 0) != module.msrs[_IA32_TSC_ADJUST]:
        raise LeafError(Status.INCONSISTENT_MSR, _IA32_TSC_ADJUST)
    if platform.rdtsc() - tdvps.last_exit_tsc >> 63 & 1:
        raise LeafError(Status.TSC_ROLLBACK)
    if tdcs.cpuid_flags.monitor_mwait and not misc_enable & _MISC_ENABLE_MONITOR_FSM:
        raise LeafError(Status.INCORRECT_MSR_VALUE, IA32_MISC_ENABLE)

    # 6. TLB tracking: this vCPU runs in the current epoch from here on.
    cpu = tdvps.cpu
    assert cpu is not None, "an initialised vCPU has a CPU"
    if tdcs.epoch_lock.raw and not tdcs.epoch_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.TD_EPOCH)
    epoch = tdcs.td_epoch
    tdcs.refcount[epoch & 1] += 1
    if epoch != tdvps.vcpu_epoch or newly_associated:
        if not newly_associated:
            cpu.invalidate()
        tdvps.vcpu_epoch = epoch
        for name in ("LP_DEPENDENT_HPA_UPDATED", "MODULE_DEPENDENT_FIELDS_UPDATED", "VM_LAUNCHED"):
            set_field(tdvps, name, 1)

    # 7. The host is not suspected of zero-stepping, or has mapped what the guest needs.
    tdvps.rip_on_entry = cpu.rip
    if tdvps.last_epf_gpa_list_idx:
        if not tdcs.sept_lock.try_exclusive():
            tdcs.refcount[epoch & 1] -= 1
            raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
        gpa = stepping.expected_fault(module, tdvps)
        if gpa is not None:
            tdcs.refcount[epoch & 1] -= 1
            return _emulate_ept_violation(regs, tdvps, gpa)
        if stepping.is_to_be_notified(tdvps):
            inject_ve(tdvps, cpu.exit.reason, cpu.exit.qualification, cpu.exit.gpa)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    gprs = cpu.gprs
    if tdvps.last_td_exit == _TDVMCALL:
        for register in selected_registers(gprs[RCX] & 0xFFFF):
            gprs[register] = regs[register]
        gprs[RAX] = 0
    elif tdvps.last_td_exit == _ASYNC_TRAP:
        gprs[RAX] = gprs[RAX] & ~_STATUS_HINT | (_STATUS_HINT if rcx & _HOST_RECOVERABILITY_HINT else 0)
    tdvps.vcpu_state = _ACTIVE
    if tdvps.pend_nmi and not tdvps.ve_info.valid:
        arm_window(tdvps)

    # The locks on TDVPR and TDR are kept until the TD exit.
    held = module.pamt.held
    tdvps.held += held
    held.clear()
    module.running[lp] = tdvps
    return TD_ENTERED


def _emulate_ept_violation(regs: Gprs, tdvps: Tdvps, gpa: int) -> int:
    """Report an EPT violation that the guest would have, without entering it."""
    tdvps.vcpu_state = _READY
    tdvps.last_td_exit = _ASYNC_FAULT
    regs[RCX] = _WRITE_QUALIFICATION | tdvps.curr_vm << 32
    regs[R8] = gpa & ~0xFFF
    for register in (RDX, R9, RBX, RSI, RDI, R10, R11, R12, R13, R14, R15):
        regs[register] = 0
    return _EPT_VIOLATION

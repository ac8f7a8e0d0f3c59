"""One entry into a TD and what its exit leads to (`tdx_vcpu_run()`, `tdx_handle_exit()`)."""

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import R8, R9, R10, R11, RAX, RCX, RDX
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, FLAGS, UNION_U32, UNION_U64
from sim_backend.kvm.tdx.init_vcpu import POSTED_INTERRUPT_VECTOR
from sim_backend.kvm.tdx.interrupts import PI_CONTROL_BYTES, PI_ON
from sim_backend.kvm.tdx.page_fault import handle_ept_violation
from sim_backend.kvm.tdx.root import load_root
from sim_backend.kvm.tdx.seamcalls import (
    ERROR,
    NON_RECOVERABLE,
    NON_RECOVERABLE_TD,
    NON_RECOVERABLE_VCPU,
    OPERAND_BUSY,
    STATUS_MASK,
    SUCCESS,
    TD_NON_ACCESSIBLE,
    TD_WRONG_APIC_MODE,
    is_software_error,
)
from sim_backend.kvm.tdx.tdvmcall.hypercall import hypercall

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

TDVMCALL: Final = int(ExitReason.TDCALL)  # RAX of VP.ENTER when the guest called
VMCALL: Final = int(ExitReason.VMCALL)
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_X86_BUS_LOCK: Final = 33
KVM_EXIT_NOTIFY: Final = 37
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
KVM_RUN_X86_BUS_LOCK: Final = 1 << 1
KVM_NOTIFY_CONTEXT_INVALID: Final = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER: Final = 1 << 1
_FAILED_ENTRY: Final = 1 << 31  # of the exit reason
_BUS_LOCK_DETECTED: Final = 1 << 26  # of the exit reason
_BASIC_REASON: Final = 0xFFFF
_ENTRY_STATUSES: Final = frozenset(
    {SUCCESS, NON_RECOVERABLE_VCPU, NON_RECOVERABLE_TD, TD_NON_ACCESSIBLE, TD_WRONG_APIC_MODE}
)
"""Statuses whose lower half KVM takes for an exit reason."""
_VECTOR: Final = 0xFF
_EVENT_TYPE: Final = 7 << 8
_EVENT_NMI: Final = 2 << 8
_EVENT_HARDWARE_EXCEPTION: Final = 3 << 8
_MC_VECTOR: Final = 18


def enter_and_exit(ops: "TdxOps", vcpu: "Vcpu") -> bool:
    """Enter the TD, handle its exit, and return True to go on, False to return to user space.

    Raise ``Errno`` when KVM_RUN itself fails.
    """
    vendor = vcpu.vendor
    if not vendor.root_loaded:
        load_root(ops, vcpu)
    if vcpu.smi_pending:
        ops.vm.bug()  # there is no SMM that it could be delivered to
        raise Errno(errno.EIO)
    if vcpu.pending_external_vector >= 0 and vcpu.apic is not None and vcpu.apic.accepts_extint():
        vcpu.pending_external_vector = -1  # taken from user space, and lost: KVM cannot inject into a TD
    regs = vendor.regs
    # Between here and the entry a kick is noticed either by us or, being sticky, by the guest's processor.
    vcpu.entries += 1
    vcpu.in_guest = True
    if vcpu.kicked or ops.td.wait_for_sept_zap:
        vcpu.in_guest = vcpu.kicked = False
        return True
    lp = vcpu.lp
    if vendor.tlb_flush:
        vendor.tlb_flush = False
        ops.host.seam.invept(lp)
    regs[RAX] = 0  # TDH.VP.ENTER
    regs[RCX] = vendor.tdvpr
    vendor.associated_lp = lp
    vcpu.has_run = True
    if ops.host.memory.q[vendor.pi_descriptor + PI_CONTROL_BYTES >> 3] & PI_ON:
        ops.host.seam.interrupt(lp, POSTED_INTERRUPT_VECTOR)  # to itself: taken as soon as the guest runs
    try:
        ops.seamcall(lp, regs)
    finally:
        vcpu.in_guest = False
    if regs[RAX] == TDVMCALL:
        return _tdvmcall(ops, vcpu, regs)
    return _handle_exit(ops, vcpu, regs)


def _tdvmcall(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    if regs[R10]:
        vcpu.vendor.last_exit = VMCALL
        return hypercall(ops, vcpu, regs)
    leaf = regs[R11]
    vcpu.vendor.last_exit = leaf
    return ops.tdvmcalls.get(leaf, ops.other_tdvmcall)(ops, vcpu, regs)


def _handle_exit(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Handle every exit that is not a TDVMCALL, checks in the order of `tdx_handle_exit()`."""
    status = regs[RAX]
    vendor = vcpu.vendor
    upper = status & STATUS_MASK
    reason = status & 0xFFFF_FFFF if upper in _ENTRY_STATUSES else -1
    vendor.last_exit = reason & _BASIC_REASON
    if upper == OPERAND_BUSY:
        return True
    if is_software_error(status):
        ops.vm.bug()
        return unexpected_exit(vcpu, status)
    if ops.host.is_v17:
        failed = bool(status & _FAILED_ENTRY) and not status & (ERROR | NON_RECOVERABLE)
    else:
        failed = reason >= 0 and bool(reason & _FAILED_ENTRY)
    if failed:
        return fail_entry(vcpu, status & 0xFFFF_FFFF)
    if status & (ERROR | NON_RECOVERABLE) and vendor.last_exit != ExitReason.TRIPLE_FAULT:
        return unexpected_exit(vcpu, status)
    handler = _EXITS.get(vendor.last_exit)
    go_on = unexpected_exit(vcpu, status) if handler is None else handler(ops, vcpu, regs)
    if reason & _BUS_LOCK_DETECTED and _knows_bus_locks(ops):
        # Whatever else the exit is for, user space hears of the bus lock now.
        vcpu.run.u16[FLAGS] |= KVM_RUN_X86_BUS_LOCK
        if go_on:
            vcpu.run.u32[EXIT_REASON] = KVM_EXIT_X86_BUS_LOCK
        return False
    return go_on


def unexpected_exit(vcpu: "Vcpu", status: int) -> bool:
    """KVM_EXIT_INTERNAL_ERROR with the raw status and the processor."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_INTERNAL_ERROR
    run.u32[UNION_U32] = KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    run.u32[UNION_U32 + 1] = 2
    run.u64[UNION_U64 + 1] = status
    run.u64[UNION_U64 + 2] = vcpu.lp
    return False


def fail_entry(vcpu: "Vcpu", reason: int) -> bool:
    """KVM_EXIT_FAIL_ENTRY."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_FAIL_ENTRY
    run.u64[UNION_U64] = reason
    run.u32[UNION_U32 + 2] = vcpu.lp
    return False


def _knows_bus_locks(ops: "TdxOps") -> bool:
    return ops.host.profile.behaves("tdx_notify_and_bus_lock_exits")


def _triple_fault(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    del ops, regs
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_SHUTDOWN
    return False


def _exception_or_nmi(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    info = regs[R9]
    if info & _EVENT_TYPE == _EVENT_NMI:
        return True  # the host's own NMI handler ran
    if info & (_EVENT_TYPE | _VECTOR) == _EVENT_HARDWARE_EXCEPTION | _MC_VECTOR:
        return True
    if ops.host.is_v17:
        raise Errno(errno.EFAULT)
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_EXCEPTION
    run.u32[UNION_U32] = info & _VECTOR
    run.u32[UNION_U32 + 1] = 0
    return False


def _go_on(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    del ops, vcpu, regs
    return True


def _ept_violation(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    return handle_ept_violation(ops, vcpu, regs[RCX] & 0xFFFF_FFFF, regs[RDX], regs[R8])


def _ept_misconfiguration(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    status = regs[RAX]
    if status != ExitReason.EPT_MISCONFIGURATION and not ops.host.is_v17:
        return unexpected_exit(vcpu, status)  # it is recognised by the whole status, not by the exit reason in it
    return ops.ept_misconfiguration(vcpu)


def _bus_lock(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    if not _knows_bus_locks(ops):
        return unexpected_exit(vcpu, regs[RAX])
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_X86_BUS_LOCK
    run.u16[FLAGS] |= KVM_RUN_X86_BUS_LOCK
    return False


def _notify(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    if not _knows_bus_locks(ops):
        return unexpected_exit(vcpu, regs[RAX])
    invalid = regs[RCX] & KVM_NOTIFY_CONTEXT_INVALID
    if not (ops.vm.notify_vmexit & KVM_X86_NOTIFY_VMEXIT_USER or invalid):
        return True
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_NOTIFY
    run.u32[UNION_U32] = invalid
    return False


ExitHandler: TypeAlias = "Callable[[TdxOps, Vcpu, list[int]], bool]"

_EXITS: Final[Mapping[int, ExitHandler]] = MappingProxyType(
    {
        ExitReason.EXCEPTION_OR_NMI: _exception_or_nmi,
        ExitReason.EXTERNAL_INTERRUPT: _go_on,
        ExitReason.TRIPLE_FAULT: _triple_fault,
        ExitReason.OTHER_SMI: _go_on,
        ExitReason.EPT_VIOLATION: _ept_violation,
        ExitReason.EPT_MISCONFIGURATION: _ept_misconfiguration,
        ExitReason.BUS_LOCK: _bus_lock,
        ExitReason.TDCALL: _tdvmcall,
        ExitReason.NOTIFY: _notify,
    }
)

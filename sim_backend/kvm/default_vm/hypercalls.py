"""VMCALL and VMMCALL of an ordinary guest (`kvm_emulate_hypercall`)."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX, RSI
from sim_backend.kvm.default_vm.guest_events import UD, raise_in_guest, skip_instruction
from sim_backend.kvm.guest_paging import read_guest, translate, write_guest
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.pv_features import (
    KVM_FEATURE_PV_SCHED_YIELD,
    KVM_FEATURE_PV_SEND_IPI,
    KVM_FEATURE_PV_UNHALT,
    guest_pv_has,
)

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_HYPERCALL: Final = 3
KVM_HC_VAPIC_POLL_IRQ: Final = 1
KVM_HC_KICK_CPU: Final = 5
KVM_HC_CLOCK_PAIRING: Final = 9
KVM_HC_SEND_IPI: Final = 10
KVM_HC_SCHED_YIELD: Final = 11
KVM_HC_MAP_GPA_RANGE: Final = 12
KVM_ENOSYS: Final = 1000
KVM_HYPERCALL_EXIT_LONG_MODE: Final = 1
_U32: Final = 0xFFFF_FFFF
_U64: Final = (1 << 64) - 1
_MAP_GPA_ARGS: Final = 3
_ICR_SHORTHAND_OR_LOGICAL: Final = 3 << 18 | 1 << 11


VMCALL: Final = bytes.fromhex("0f01c1")
VMMCALL: Final = bytes.fromhex("0f01d9")
_QUIRK_FIX_HYPERCALL_INSN: Final = 1 << 5


def hypercall_instruction(vcpu: "Vcpu", cpu: Cpu) -> bool | None:
    """Act on an instruction at RIP that is VMCALL or VMMCALL; None when it is neither.

    The CPU knows one of them; the other is #UD there, and KVM rewrites it in the guest (the quirk
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN) and lets it run again.
    """
    state = cpu.get_state()
    linear = cpu.rip if cpu.in_64bit_mode() else state.cs.base + cpu.rip & _U32
    physical = translate(vcpu, linear)
    code = read_guest(vcpu.vm, physical, 3) if physical is not None else None
    if code not in (VMCALL, VMMCALL) or physical is None:
        return None
    native = VMCALL if vcpu.vm.host.profile.hypercall_instruction == "vmcall" else VMMCALL
    if code == native:
        cpu.exit.instruction_length = 3
        return emulate_hypercall(vcpu, cpu)
    if vcpu.vm.disabled_quirks & _QUIRK_FIX_HYPERCALL_INSN or not write_guest(vcpu.vm, physical, native):
        return raise_in_guest(vcpu, cpu, UD)
    slot = vcpu.vm.find_memslot(physical >> 12)
    if slot is not None:
        cpu.invalidate_code(slot.user_hpa(vcpu.vm.host.memory, physical >> 12), 4096)
    return True


def emulate_hypercall(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Dispatch on RAX; the result goes to RAX, at once or when user space has answered."""
    gprs = cpu.gprs
    long_mode = cpu.in_64bit_mode()
    mask = _U64 if long_mode else _U32
    number, *args = (gprs[index] & mask for index in (RAX, RBX, RCX, RDX, RSI))
    if cpu.cpl():
        return _finish(vcpu, cpu, -errno.EPERM, mask)
    if number == KVM_HC_MAP_GPA_RANGE and vcpu.vm.exit_hypercall_mask >> number & 1:
        gpa, npages = args[0], args[1]
        if gpa & 0xFFF or not npages or gpa + (npages << 12) > _U64:
            return _finish(vcpu, cpu, -errno.EINVAL, mask)
        run = vcpu.run
        run.u32[EXIT_REASON] = KVM_EXIT_HYPERCALL
        run.u64[UNION_U64] = number
        for index in range(6):
            run.u64[UNION_U64 + 1 + index] = args[index] if index < _MAP_GPA_ARGS else run.u64[UNION_U64 + 1 + index]
        run.u64[UNION_U64 + 7] = 0
        run.u64[UNION_U64 + 8] = KVM_HYPERCALL_EXIT_LONG_MODE if long_mode else 0

        def complete() -> bool:
            result = run.u64[UNION_U64 + 7]
            gprs[RAX] = result & (_U64 if cpu.in_64bit_mode() else _U32)
            skip_instruction(vcpu, cpu)
            return True

        vcpu.complete_userspace_io = complete
        return False
    return _finish(vcpu, cpu, _in_kernel(vcpu, number, args, 64 if long_mode else 32), mask)


def _in_kernel(vcpu: "Vcpu", number: int, args: list[int], bits: int) -> int:
    if number == KVM_HC_VAPIC_POLL_IRQ:
        return 0
    if number == KVM_HC_KICK_CPU and guest_pv_has(vcpu, KVM_FEATURE_PV_UNHALT):
        for other in vcpu.vm.vcpus:
            if other.id == args[1] & _U32 and other.apic is not None:
                other.unhalt_by_message()
        return 0
    if number == KVM_HC_SEND_IPI and guest_pv_has(vcpu, KVM_FEATURE_PV_SEND_IPI):
        return _send_ipi(vcpu, args, bits)
    if number == KVM_HC_SCHED_YIELD and guest_pv_has(vcpu, KVM_FEATURE_PV_SCHED_YIELD):
        return 0
    if number == KVM_HC_CLOCK_PAIRING:
        return -errno.EOPNOTSUPP  # the host clock is not derived from the TSC
    return -KVM_ENOSYS


def _send_ipi(vcpu: "Vcpu", args: list[int], bits: int) -> int:
    """Send the IPI of ICR args[3] to APIC ids args[2] + bit for the bits of args[0] and args[1] (kvm_pv_send_ipi).

    args[1] goes on where args[0] ends: at bit 64, or 32 for a caller that is not in 64-bit mode.
    """
    low, high, first, icr = args
    irqchip = vcpu.vm.irqchip
    if icr & _ICR_SHORTHAND_OR_LOGICAL or icr >> 8 & 7 == 7:
        return -errno.EINVAL
    if irqchip is None:
        return -errno.EOPNOTSUPP
    return irqchip.send_pv_ipi((low, high), first, icr, bits=bits)


def _finish(vcpu: "Vcpu", cpu: Cpu, result: int, mask: int) -> bool:
    cpu.gprs[RAX] = result & mask
    skip_instruction(vcpu, cpu)
    return True

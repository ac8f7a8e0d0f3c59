"""TDVMCALLs with R10 ≠ 0: KVM's own hypercalls, the number in R10, arguments in R11 to R14, the result in R10."""

import struct
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13, R14
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.msrs import guest_tsc

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1
KVM_HC_VAPIC_POLL_IRQ: Final = 1
KVM_HC_KICK_CPU: Final = 5
KVM_HC_CLOCK_PAIRING: Final = 9
KVM_HC_SEND_IPI: Final = 10
KVM_HC_SCHED_YIELD: Final = 11
KVM_HC_MAP_GPA_RANGE: Final = 12
KVM_CLOCK_PAIRING_WALLCLOCK: Final = 0
KVM_EFAULT: Final = 14
KVM_EINVAL: Final = 22
KVM_EOPNOTSUPP: Final = 95
KVM_ENOSYS: Final = 1000
_U64: Final = (1 << 64) - 1
_CLOCK_PAIRING: Final = struct.Struct("<qqQI36x")
_ICR_DESTINATION_AND_SHORTHAND: Final = 0xC0000 | 1 << 11
_KVM_CPUID_FEATURES: Final = 0x4000_0001
_PV_FEATURES: Final[Mapping[int, int]] = MappingProxyType(
    {KVM_HC_KICK_CPU: 7, KVM_HC_SEND_IPI: 11, KVM_HC_SCHED_YIELD: 13}  # KVM_FEATURE_PV_UNHALT, _SEND_IPI, _SCHED_YIELD
)
"""The bit of the feature leaf that offers a hypercall, for user space that wants that enforced."""


def hypercall(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Handle a KVM hypercall (`tdx_emulate_vmcall()`, `____kvm_emulate_hypercall()`)."""
    number = regs[R10]
    if number == KVM_HC_MAP_GPA_RANGE:
        return _map_gpa_range(ops, vcpu, regs)
    handler = _HYPERCALLS.get(number) if _is_offered(vcpu, number) else None
    regs[R10] = (-KVM_ENOSYS if handler is None else handler(vcpu, regs)) & _U64
    return True


def _map_gpa_range(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Forward the request as it is: the S-bit stays, nothing is split, the answer goes to the guest unchecked."""
    if not vcpu.vm.exit_hypercall_mask >> KVM_HC_MAP_GPA_RANGE & 1:
        regs[R10] = -KVM_ENOSYS & _U64
        return True
    gpa, pages = regs[R11], regs[R12]
    if gpa % 4096 or pages == 0 or ((gpa >> 12) + pages & _U64) <= gpa >> 12:
        regs[R10] = -KVM_EINVAL & _U64
        return True
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_HYPERCALL
    run.u64[UNION_U64] = KVM_HC_MAP_GPA_RANGE
    for word, value in enumerate((gpa, pages, regs[R13], 0, 0, 0, 0), UNION_U64 + 1):
        run.u64[word] = value
    run.u64[UNION_U64 + 8] = KVM_EXIT_HYPERCALL_LONG_MODE
    if ops.host.is_v17:
        regs[R10] = 0  # at once; hypercall.ret never gets there
    else:
        vcpu.complete_userspace_io = lambda: _complete_map_gpa_range(vcpu)
    return False


def _complete_map_gpa_range(vcpu: "Vcpu") -> bool:
    vcpu.vendor.regs[R10] = vcpu.run.u64[UNION_U64 + 7]
    return True


def _is_offered(vcpu: "Vcpu", number: int) -> bool:
    """Tell whether the vCPU's CPUID table offers the hypercall, or nobody cares (`guest_pv_has()`)."""
    feature = _PV_FEATURES.get(number)
    if feature is None or not vcpu.enforce_pv_features:
        return True
    return vcpu.cpuid.has(_KVM_CPUID_FEATURES, "eax", feature)


def _nothing(vcpu: "Vcpu", regs: list[int]) -> int:
    del vcpu, regs
    return 0


def _kick_cpu(vcpu: "Vcpu", regs: list[int]) -> int:
    """R12 = APIC id of the vCPU to wake."""
    target = vcpu.vm.vcpus_by_id.get(regs[R12] & 0xFFFF_FFFF)
    if target is not None:
        target.pv_unhalted = True
        target.kick()
    return 0


def _send_ipi(vcpu: "Vcpu", regs: list[int]) -> int:
    """R11, R12 = bitmap of APIC ids from R13 on, R14 = ICR; return how many took it (`kvm_pv_send_ipi()`)."""
    irqchip = vcpu.vm.irqchip
    icr = regs[R14]
    if irqchip is None or icr & _ICR_DESTINATION_AND_SHORTHAND:
        return -KVM_EINVAL
    return irqchip.send_pv_ipi((regs[R11], regs[R12]), regs[R13], icr)


def _clock_pairing(vcpu: "Vcpu", regs: list[int]) -> int:
    """R11 = GPA of the result, R12 = clock type; written through the slot's user memory."""
    if regs[R12] != KVM_CLOCK_PAIRING_WALLCLOCK:
        return -KVM_EOPNOTSUPP
    gpa = regs[R11]
    slot = vcpu.vm.find_memslot(gpa >> 12)
    if slot is None:
        return -KVM_EFAULT
    now = time.time_ns()
    data = _CLOCK_PAIRING.pack(now // 1_000_000_000, now % 1_000_000_000, guest_tsc(vcpu), 0)
    try:
        slot.mm.write(slot.hva(gpa >> 12) + gpa % 4096, data)
    except Errno:
        return -KVM_EFAULT
    return 0


_HYPERCALLS: Final[Mapping[int, Callable[["Vcpu", list[int]], int]]] = MappingProxyType(
    {
        KVM_HC_VAPIC_POLL_IRQ: _nothing,
        KVM_HC_KICK_CPU: _kick_cpu,
        KVM_HC_CLOCK_PAIRING: _clock_pairing,
        KVM_HC_SEND_IPI: _send_ipi,
        KVM_HC_SCHED_YIELD: _nothing,
    }
)

"""KVM's own paravirtual features: what the CPUID table offers, and who asks (`guest_pv_has()`)."""

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_SIGNATURE: Final = struct.unpack("<III", b"KVMKVMKVM\0\0\0")  # EBX, ECX, EDX of the base leaf
_BASES: Final = range(0x4000_0000, 0x4001_0000, 0x100)

KVM_FEATURE_CLOCKSOURCE: Final = 0
KVM_FEATURE_CLOCKSOURCE2: Final = 3
KVM_FEATURE_ASYNC_PF: Final = 4
KVM_FEATURE_STEAL_TIME: Final = 5
KVM_FEATURE_PV_EOI: Final = 6
KVM_FEATURE_PV_UNHALT: Final = 7
KVM_FEATURE_ASYNC_PF_VMEXIT: Final = 10
KVM_FEATURE_PV_SEND_IPI: Final = 11
KVM_FEATURE_POLL_CONTROL: Final = 12
KVM_FEATURE_PV_SCHED_YIELD: Final = 13
KVM_FEATURE_ASYNC_PF_INT: Final = 14


def guest_pv_has(vcpu: "Vcpu", feature: int) -> bool:
    """Tell whether the guest may use `feature`: always, unless KVM_CAP_ENFORCE_PV_FEATURE_CPUID asks the table."""
    if not vcpu.enforce_pv_features:
        return True
    for base in _BASES:
        leaf = vcpu.cpuid.find(base)
        if leaf is not None and (leaf.ebx, leaf.ecx, leaf.edx) == _SIGNATURE:
            features = vcpu.cpuid.find(base + 1)
            return features is not None and bool(features.eax >> feature & 1)
    return False

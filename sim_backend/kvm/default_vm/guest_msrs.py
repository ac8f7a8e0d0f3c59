"""What an ordinary guest's own RDMSR and WRMSR may reach, where user space's ioctls may reach more.

Most of it: an MSR that belongs to a feature is #GP (`MsrRefused`) for a guest whose CPUID table lacks the feature.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.hyperv_msrs import HYPERV_MSRS
from sim_backend.kvm.msrs import (
    MSR_AMD64_OSVW_ID_LENGTH,
    MSR_AMD64_OSVW_STATUS,
    MSR_IA32_ARCH_CAPABILITIES,
    MSR_IA32_FLUSH_CMD,
    MSR_IA32_MCG_CAP,
    MSR_IA32_MCG_CTL,
    MSR_IA32_MISC_ENABLE,
    MSR_IA32_PERF_CAPABILITIES,
    MSR_IA32_PRED_CMD,
    MSR_IA32_SMBASE,
    MSR_IA32_SPEC_CTRL,
    MSR_IA32_XFD,
    MSR_IA32_XFD_ERR,
    MSR_IA32_XSS,
    MSR_MTRRCAP,
    MsrRefused,
    MsrUnknown,
    get_msr_common,
)

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_TSC_AUX: Final = 0xC000_0103
_TSC_RATIO: Final = 0xC000_0104
_VM_HSAVE_PA: Final = 0xC001_0117
_VIRT_SPEC_CTRL: Final = 0xC001_011F
_HYPERV: Final = range(0x4000_0000, 0x4000_00A0)
_MISC_ENABLE_READ_ONLY: Final = 1 << 11 | 1 << 12  # BTS and PEBS unavailable
_MISC_ENABLE_EMON: Final = 1 << 7

Feature = tuple[int, int, str, int]
"""CPUID leaf, its index, register, bit."""

_ANY_OF: Final = MappingProxyType[int, tuple[Feature, ...]](
    {
        MSR_IA32_SPEC_CTRL: (
            (7, 0, "edx", 26),
            *((0x8000_0008, 0, "ebx", bit) for bit in (14, 15, 24)),  # IBRS, STIBP, SSBD
        ),
        MSR_IA32_XFD: ((0xD, 1, "eax", 4),),
        MSR_IA32_XFD_ERR: ((0xD, 1, "eax", 4),),
        _TSC_AUX: ((0x8000_0001, 0, "edx", 27), (7, 0, "ecx", 22)),  # RDTSCP, RDPID
        _TSC_RATIO: ((0x8000_000A, 0, "edx", 4),),
        _VIRT_SPEC_CTRL: ((0x8000_0008, 0, "ebx", 25),),
        MSR_AMD64_OSVW_ID_LENGTH: ((0x8000_0001, 0, "ecx", 9),),
        MSR_AMD64_OSVW_STATUS: ((0x8000_0001, 0, "ecx", 9),),
    }
)
_ANY_OF_TO_READ: Final = MappingProxyType({**_ANY_OF, MSR_IA32_XSS: ((0xD, 1, "eax", 3),)})
_ANY_OF_TO_WRITE: Final = MappingProxyType(
    {
        **_ANY_OF,
        MSR_IA32_PRED_CMD: ((7, 0, "edx", 26), (0x8000_0008, 0, "ebx", 12), (0x8000_0021, 0, "eax", 27)),
        MSR_IA32_FLUSH_CMD: ((7, 0, "edx", 28),),
    }
)
_PDCM: Final = (1, 0, "ecx", 15)
_READ_ONLY_AND_UNKNOWN_TO_WRITES: Final = frozenset({MSR_MTRRCAP, MSR_IA32_MCG_CAP, MSR_IA32_ARCH_CAPABILITIES})


def check_guest_read(vcpu: "Vcpu", index: int) -> None:
    """Raise `MsrRefused` or `MsrUnknown` where the guest may not read what user space may."""
    _check(vcpu, index, _ANY_OF_TO_READ)
    if index == MSR_IA32_PERF_CAPABILITIES and not _has(vcpu, _PDCM):
        raise MsrUnknown
    if index == MSR_IA32_SMBASE:
        raise MsrRefused


def check_guest_write(vcpu: "Vcpu", index: int, value: int) -> int:
    """Do likewise for a write; return the value to store."""
    _check(vcpu, index, _ANY_OF_TO_WRITE)
    if index in _READ_ONLY_AND_UNKNOWN_TO_WRITES or index == MSR_IA32_PERF_CAPABILITIES:
        raise MsrUnknown
    if index == _VM_HSAVE_PA and (value & 0xFFF or value >> vcpu.cpuid.maxphyaddr):
        raise MsrRefused
    if index == MSR_IA32_MISC_ENABLE:
        old = get_msr_common(vcpu, index, host_initiated=True)
        if (old ^ value) & _MISC_ENABLE_READ_ONLY:
            raise MsrRefused
        return value & ~_MISC_ENABLE_EMON | old & _MISC_ENABLE_EMON
    return value


def _check(vcpu: "Vcpu", index: int, any_of: Mapping[int, tuple[Feature, ...]]) -> None:
    features = any_of.get(index)
    if features is not None and not any(_has(vcpu, feature) for feature in features):
        raise MsrRefused
    if index == MSR_IA32_MCG_CTL and not vcpu.mcg_cap >> 8 & 1:
        raise MsrRefused
    if index in _HYPERV and index not in HYPERV_MSRS and vcpu.vm.host.profile.behaves("hyperv"):
        raise MsrRefused  # Hyper-V's, if of no use: not unknown


def _has(vcpu: "Vcpu", feature: Feature) -> bool:
    function, index, register, bit = feature
    entry = vcpu.cpuid.find(function, index)
    return entry is not None and bool(getattr(entry, register) >> bit & 1)

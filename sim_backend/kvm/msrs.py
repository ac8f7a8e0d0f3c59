"""Model-specific registers that KVM itself keeps (`kvm_get_msr_common`, `kvm_set_msr_common`, mtrr.c, MCE).

State-backed ones of an unprotected vCPU (EFER, segment bases, SYSCALL and SYSENTER) are handled by its operations.
"""

import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.lapic import APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_X2APIC, ICR
from sim_backend.kvm.pv_features import (
    KVM_FEATURE_ASYNC_PF,
    KVM_FEATURE_ASYNC_PF_INT,
    KVM_FEATURE_ASYNC_PF_VMEXIT,
    KVM_FEATURE_CLOCKSOURCE,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_POLL_CONTROL,
    KVM_FEATURE_PV_EOI,
    KVM_FEATURE_STEAL_TIME,
    guest_pv_has,
)

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

MSR_IA32_TSC: Final = 0x10
MSR_IA32_APICBASE: Final = 0x1B
MSR_SMI_COUNT: Final = 0x34
MSR_IA32_FEAT_CTL: Final = 0x3A
MSR_IA32_TSC_ADJUST: Final = 0x3B
MSR_IA32_SPEC_CTRL: Final = 0x48
MSR_IA32_PRED_CMD: Final = 0x49
MSR_IA32_UCODE_REV: Final = 0x8B
MSR_IA32_SMBASE: Final = 0x9E
MSR_PLATFORM_INFO: Final = 0xCE
MSR_IA32_UMWAIT_CONTROL: Final = 0xE1
MSR_MTRRCAP: Final = 0xFE
MSR_IA32_ARCH_CAPABILITIES: Final = 0x10A
MSR_IA32_FLUSH_CMD: Final = 0x10B
MSR_MISC_FEATURES_ENABLES: Final = 0x140
MSR_IA32_MCG_CAP: Final = 0x179
MSR_IA32_MCG_STATUS: Final = 0x17A
MSR_IA32_MCG_CTL: Final = 0x17B
MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_IA32_POWER_CTL: Final = 0x1FC
MSR_MTRR_FIRST: Final = 0x200
MSR_MTRR_LAST: Final = 0x26F
MSR_IA32_CR_PAT: Final = 0x277
MSR_MTRR_DEF_TYPE: Final = 0x2FF
MSR_IA32_PERF_CAPABILITIES: Final = 0x345
MSR_IA32_MC0_CTL: Final = 0x400
MSR_IA32_MC0_CTL2: Final = 0x280
MSR_IA32_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC_FIRST: Final = 0x800
MSR_X2APIC_LAST: Final = 0x8FF
MSR_IA32_XSS: Final = 0xDA0
MSR_IA32_XFD: Final = 0x1C4
MSR_IA32_XFD_ERR: Final = 0x1C5
MSR_EFER: Final = 0xC000_0080
MSR_K7_HWCR: Final = 0xC001_0015
MSR_FAM10H_MMIO_CONF_BASE: Final = 0xC001_0058
MSR_AMD64_OSVW_ID_LENGTH: Final = 0xC001_0140
MSR_AMD64_OSVW_STATUS: Final = 0xC001_0141
MSR_KVM_WALL_CLOCK: Final = 0x11
MSR_KVM_SYSTEM_TIME: Final = 0x12
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B56_4D00
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B56_4D01
MSR_KVM_ASYNC_PF_EN: Final = 0x4B56_4D02
MSR_KVM_STEAL_TIME: Final = 0x4B56_4D03
MSR_KVM_PV_EOI_EN: Final = 0x4B56_4D04
MSR_KVM_POLL_CONTROL: Final = 0x4B56_4D05
MSR_KVM_ASYNC_PF_INT: Final = 0x4B56_4D06
MSR_KVM_ASYNC_PF_ACK: Final = 0x4B56_4D07
_ASYNC_PF_AS_VMEXIT: Final = 1 << 2
_ASYNC_PF_AS_INT: Final = 1 << 3
_ASYNC_PF_ENABLED: Final = 1 | _ASYNC_PF_AS_INT
_OLD_NAMES: Final = {MSR_KVM_WALL_CLOCK: MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME: MSR_KVM_SYSTEM_TIME_NEW}
_PV_FEATURES: Final = {
    MSR_KVM_WALL_CLOCK: KVM_FEATURE_CLOCKSOURCE,
    MSR_KVM_SYSTEM_TIME: KVM_FEATURE_CLOCKSOURCE,
    MSR_KVM_WALL_CLOCK_NEW: KVM_FEATURE_CLOCKSOURCE2,
    MSR_KVM_SYSTEM_TIME_NEW: KVM_FEATURE_CLOCKSOURCE2,
    MSR_KVM_ASYNC_PF_EN: KVM_FEATURE_ASYNC_PF,
    MSR_KVM_STEAL_TIME: KVM_FEATURE_STEAL_TIME,
    MSR_KVM_PV_EOI_EN: KVM_FEATURE_PV_EOI,
    MSR_KVM_POLL_CONTROL: KVM_FEATURE_POLL_CONTROL,
    MSR_KVM_ASYNC_PF_INT: KVM_FEATURE_ASYNC_PF_INT,
    MSR_KVM_ASYNC_PF_ACK: KVM_FEATURE_ASYNC_PF_INT,
}

CLEARED_BY_INIT: Final = (
    MSR_IA32_SPEC_CTRL,
    MSR_IA32_UMWAIT_CONTROL,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_PV_EOI_EN,
    MSR_KVM_ASYNC_PF_INT,
)
"""All others keep their value (`kvm_vcpu_reset()`)."""

PAT_RESET: Final = 0x0007_0406_0007_0406
MTRR_VARIABLE_COUNT: Final = 8
MTRR_CAP: Final = 0x500 | MTRR_VARIABLE_COUNT  # write-combining and fixed ranges
_MTRR_FIXED: Final = frozenset({0x250, 0x258, 0x259, *range(0x268, 0x270)})
_MEMORY_TYPES: Final = frozenset({0, 1, 4, 5, 6})
_PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
MISC_ENABLE_RESET: Final = 1 << 12 | 1 << 11  # no PEBS, no BTS
MISC_ENABLE_PRESERVED: Final = 1 << 12 | 1 << 11  # PEBS unavailable, BTS unavailable: kept by the host
_U64: Final = (1 << 64) - 1


class MsrUnknown(Exception):  # noqa: N818 - a kernel return code
    """KVM does not know the MSR (KVM_MSR_RET_UNSUPPORTED)."""


class MsrRefused(Exception):  # noqa: N818 - a kernel return code
    """KVM knows the MSR and refuses this access: #GP for the guest."""


def is_x2apic(index: int) -> bool:
    """Tell whether `index` is in the x2APIC range, which no MSR filter reaches."""
    return MSR_X2APIC_FIRST <= index <= MSR_X2APIC_LAST


def guest_tsc(vcpu: "Vcpu") -> int:
    """Return the vCPU's TSC now, from the host's monotonic clock at the vCPU's frequency."""
    return time.monotonic_ns() * vcpu.tsc_khz // 1_000_000 + vcpu.tsc_offset & _U64


def _check_pv_feature(vcpu: "Vcpu", index: int) -> None:
    feature = _PV_FEATURES.get(index)
    if feature is not None and not guest_pv_has(vcpu, feature):
        raise MsrUnknown


def get_msr_common(vcpu: "Vcpu", index: int, host_initiated: bool) -> int:
    """Return an MSR that every kind of VM has. Raise `MsrUnknown` or `MsrRefused`."""
    _check_pv_feature(vcpu, index)
    if is_x2apic(index):
        return _get_x2apic(vcpu, index)
    if MSR_MTRR_FIRST <= index <= MSR_MTRR_LAST or index in (MSR_MTRRCAP, MSR_MTRR_DEF_TYPE):
        return _get_mtrr(vcpu, index)
    if index == MSR_IA32_APICBASE:
        return vcpu.apic_base
    if index == MSR_IA32_TSC:
        return guest_tsc(vcpu)
    if index == MSR_IA32_TSC_DEADLINE:
        return vcpu.apic.timer.read_tsc_deadline() if vcpu.apic is not None else 0
    if index in (MSR_IA32_PRED_CMD, MSR_IA32_FLUSH_CMD):
        raise MsrUnknown
    constant = _READABLE.get(index)
    if constant is not None:
        return constant
    reset = _KEPT.get(index)
    if reset is not None:
        if not _vcpu_has(vcpu, index):
            raise MsrUnknown
        if index == MSR_PLATFORM_INFO and not host_initiated and not vcpu.vm.guest_can_read_platform_info:
            raise MsrRefused
        value = _values_of(vcpu, index).get(_OLD_NAMES.get(index, index))
        if value is None and not vcpu.feature_msrs_stuffed and index in _STUFFED:
            return 0
        if value is None and index == MSR_IA32_ARCH_CAPABILITIES and not vcpu.vm.ops.has_protected_state:
            value = vcpu.vm.host.profile.feature_msrs.get(index)
        return value if value is not None else vcpu.vm.host.profile.msr_reset.get(index, reset)
    if _mce_register(vcpu, index):
        if index < MSR_IA32_MC0_CTL and index >= MSR_IA32_MC0_CTL2 and not host_initiated and not _has_cmci(vcpu):
            raise MsrRefused
        return vcpu.mcg_cap if index == MSR_IA32_MCG_CAP else vcpu.msrs.get(index, 0)
    raise MsrUnknown


def set_msr_common(vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
    """Set an MSR that every kind of VM has. Raise `MsrUnknown` or `MsrRefused`."""
    _check_pv_feature(vcpu, index)
    if is_x2apic(index):
        _set_x2apic(vcpu, index, value)
    elif MSR_MTRR_FIRST <= index <= MSR_MTRR_LAST or index in (MSR_MTRRCAP, MSR_MTRR_DEF_TYPE):
        _set_mtrr(vcpu, index, value)
    elif index == MSR_IA32_APICBASE:
        set_apic_base(vcpu, value, host_initiated)
    elif index == MSR_IA32_TSC:
        vcpu.tsc_offset = (vcpu.tsc_offset + value - guest_tsc(vcpu)) & _U64
    elif index == MSR_IA32_TSC_DEADLINE:
        if vcpu.apic is not None:
            vcpu.apic.timer.arm_tsc_deadline(value, guest_tsc(vcpu))
    elif index in _WRITES_IGNORED:
        return
    elif index == MSR_FAM10H_MMIO_CONF_BASE:
        if value:
            raise MsrRefused
    elif index in _KEPT:
        if not _vcpu_has(vcpu, index):
            raise MsrUnknown
        _set_kept(vcpu, index, value, host_initiated)
    elif _mce_register(vcpu, index):
        _set_mce(vcpu, index, value, host_initiated)
    else:
        raise MsrUnknown


# ---- registers that are a value with a few rules ------------------------------------------------------------

_KEPT: Final = {
    # index: reset value (a profile's `msr_reset` replaces it)
    MSR_IA32_UCODE_REV: 0x1_0000_0000,
    MSR_IA32_ARCH_CAPABILITIES: 0,
    MSR_IA32_PERF_CAPABILITIES: 0,
    MSR_IA32_POWER_CTL: 0,
    MSR_IA32_CR_PAT: PAT_RESET,
    MSR_IA32_MISC_ENABLE: MISC_ENABLE_RESET,
    MSR_PLATFORM_INFO: 1 << 31,
    MSR_MISC_FEATURES_ENABLES: 0,
    MSR_IA32_TSC_ADJUST: 0,
    MSR_SMI_COUNT: 0,
    MSR_IA32_SMBASE: 0x30000,
    MSR_IA32_XSS: 0,
    MSR_IA32_XFD: 0,
    MSR_IA32_XFD_ERR: 0,
    MSR_K7_HWCR: 0,
    MSR_AMD64_OSVW_ID_LENGTH: 0,
    MSR_AMD64_OSVW_STATUS: 0,
    MSR_KVM_WALL_CLOCK: 0,
    MSR_KVM_SYSTEM_TIME: 0,
    MSR_KVM_WALL_CLOCK_NEW: 0,
    MSR_KVM_SYSTEM_TIME_NEW: 0,
    MSR_KVM_ASYNC_PF_EN: 0,
    MSR_KVM_STEAL_TIME: 0,
    MSR_KVM_PV_EOI_EN: 0,
    MSR_KVM_POLL_CONTROL: 1,
    MSR_KVM_ASYNC_PF_INT: 0,
    MSR_KVM_ASYNC_PF_ACK: 0,
}
_READABLE: Final = MappingProxyType(
    {
        # What guests poke at: P4 and K7 leftovers, RAPL, AMD's system configuration. Each reads as a constant.
        **dict.fromkeys((0x17, 0x2A, 0x199, 0x606, 0x611, 0x619, 0x639, 0x641), 0),
        **dict.fromkeys((0xC001_0010, 0xC001_0055, 0xC001_0112, 0xC001_0113), 0),
        0x2C: 1 << 24,  # MSR_EBC_FREQUENCY_ID
        0xCD: 3,  # MSR_FSB_FREQ
        0x198: 1000 | 4 << 40,  # MSR_IA32_PERF_STATUS
        0x11E: 0xBE70_2111,  # MSR_IA32_BBL_CR_CTL3
        0xC001_001B: 0x2000_0000,  # MSR_K7_CLK_CTL
        # Performance counters of guests without a PMU.
        **dict.fromkeys((0xC1, 0xC2, 0x186, 0x187, *range(0xC001_0000, 0xC001_0008)), 0),
        **dict.fromkeys((0xC001_001F, 0xC001_0058, 0xC001_0117), 0),
        **dict.fromkeys((0xC001_1022, 0xC001_1023, 0xC001_102A, 0xC001_102C), 0),
    }
)
_WRITES_IGNORED: Final = frozenset(
    {0x79, 0x11E, 0xC001_001B, 0xC001_001F, 0xC001_0020, 0xC001_0117}
    | {0xC1, 0xC2, 0x186, 0x187, *range(0xC001_0000, 0xC001_0008)}
    | {0xC001_1022, 0xC001_1023, 0xC001_102A, 0xC001_102C}
)
_HOST_ONLY: Final = frozenset(
    {MSR_IA32_ARCH_CAPABILITIES, MSR_IA32_PERF_CAPABILITIES, MSR_PLATFORM_INFO, MSR_SMI_COUNT, MSR_IA32_SMBASE}
)
_HWCR_IGNORED: Final = 0x148  # TLB cache, FFDIS, IGNNE
_HWCR_KEPT: Final = 1 << 18 | 1 << 24  # McStatusWrEn, TscFreqSel
_STUFFED: Final = frozenset({MSR_IA32_ARCH_CAPABILITIES, MSR_PLATFORM_INFO})
"""Zero in a vCPU that was created with the quirk KVM_X86_QUIRK_STUFF_FEATURE_MSRS off."""
_FROZEN_AFTER_RUN: Final = frozenset({MSR_IA32_ARCH_CAPABILITIES, MSR_PLATFORM_INFO, MSR_IA32_PERF_CAPABILITIES})


def _vcpu_has(vcpu: "Vcpu", index: int) -> bool:
    """Tell whether the host, or the vCPU's CPUID table, has the feature that brings the MSR."""
    if index == MSR_IA32_SMBASE:
        return vcpu.vm.host.profile.behaves("smm")
    if index == MSR_IA32_ARCH_CAPABILITIES and not vcpu.vm.ops.has_protected_state:
        return vcpu.cpuid.has(7, "edx", 29)
    if index in (MSR_AMD64_OSVW_ID_LENGTH, MSR_AMD64_OSVW_STATUS):
        return vcpu.cpuid.has(0x8000_0001, "ecx", 9)
    return True


def _set_kept(vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
    if index in _HOST_ONLY and not host_initiated:
        raise MsrRefused
    if index in _FROZEN_AFTER_RUN and vcpu.has_run and value != get_msr_common(vcpu, index, host_initiated=True):
        raise MsrRefused
    if index == MSR_IA32_TSC_ADJUST and not vcpu.cpuid.has(7, "ebx", 1):
        return  # without the feature a write has no effect
    if index == MSR_IA32_XSS:
        if not vcpu.cpuid.has_xsaves:
            raise MsrUnknown
        if value:
            raise MsrRefused  # no supervisor state is offered to these guests
    if index in (MSR_IA32_XFD, MSR_IA32_XFD_ERR) and value & ~(vcpu.cpuid.has(0xD, "eax", 18) << 18):
        raise MsrRefused
    if index == MSR_IA32_PERF_CAPABILITIES and value & ~vcpu.vm.host.profile.feature_msrs.get(index, 0):
        raise MsrRefused
    if index == MSR_K7_HWCR:
        value &= ~_HWCR_IGNORED
        if value & ~_HWCR_KEPT:
            raise MsrRefused
    if index == MSR_IA32_UCODE_REV and not host_initiated:
        return  # a guest's microcode "update trigger" is ignored
    if index == MSR_IA32_CR_PAT and any(value >> shift & 0xFF not in _PAT_TYPES for shift in range(0, 64, 8)):
        raise MsrRefused
    if index == MSR_MISC_FEATURES_ENABLES:
        cpuid_fault = get_msr_common(vcpu, MSR_PLATFORM_INFO, host_initiated=True) >> 31 & 1
        if value & ~1 or (value & 1 and not cpuid_fault):
            raise MsrRefused
    if index == MSR_IA32_MISC_ENABLE and not host_initiated:
        kept = get_msr_common(vcpu, index, host_initiated=True) & MISC_ENABLE_PRESERVED
        value = value & ~MISC_ENABLE_PRESERVED | kept
    if index == MSR_KVM_POLL_CONTROL and value & ~1:
        raise MsrRefused
    if index in (MSR_KVM_ASYNC_PF_EN, MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI_EN):
        _check_pv_area(vcpu, index, value)
    if index == MSR_KVM_ASYNC_PF_INT and (value >> 8 or vcpu.apic is None):
        raise MsrRefused
    if index == MSR_KVM_ASYNC_PF_ACK:
        return
    _values_of(vcpu, index)[_OLD_NAMES.get(index, index)] = value


def _values_of(vcpu: "Vcpu", index: int) -> dict[int, int]:
    """Return where the value is kept: the wall clock is the VM's."""
    return vcpu.vm.msrs if index in (MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW) else vcpu.msrs


def _check_pv_area(vcpu: "Vcpu", index: int, value: int) -> None:
    reserved = {MSR_KVM_ASYNC_PF_EN: 0x30, MSR_KVM_STEAL_TIME: 0x3E, MSR_KVM_PV_EOI_EN: 0x2}[index]
    if value & reserved:
        raise MsrRefused
    if index == MSR_KVM_ASYNC_PF_EN:
        if value & _ASYNC_PF_AS_VMEXIT and not guest_pv_has(vcpu, KVM_FEATURE_ASYNC_PF_VMEXIT):
            raise MsrRefused
        if value & _ASYNC_PF_AS_INT and not guest_pv_has(vcpu, KVM_FEATURE_ASYNC_PF_INT):
            raise MsrRefused
        if value and vcpu.apic is None:
            raise MsrRefused
    enabled = value & _ASYNC_PF_ENABLED == _ASYNC_PF_ENABLED if index == MSR_KVM_ASYNC_PF_EN else value & 1
    if index != MSR_KVM_STEAL_TIME and enabled and vcpu.vm.find_memslot(value >> 12) is None:
        raise MsrRefused  # the area's address is looked up at once


# ---- APIC base, x2APIC ------------------------------------------------------------------------------------


def apic_mode(base: int) -> int:
    """Return the mode bits of an IA32_APIC_BASE value: 0 off, 0x800 xAPIC, 0xC00 x2APIC, 0x400 invalid."""
    return base & (APIC_BASE_ENABLE | APIC_BASE_X2APIC)


def set_apic_base(vcpu: "Vcpu", value: int, host_initiated: bool) -> None:
    """Set IA32_APIC_BASE with KVM's checks; raise `MsrRefused` (kvm_apic_set_base)."""
    x2apic_allowed = vcpu.cpuid.has_x2apic
    reserved = ~((1 << vcpu.cpuid.maxphyaddr) - 1) & _U64 | 0x2FF
    if not x2apic_allowed:
        reserved |= APIC_BASE_X2APIC
    new, old = apic_mode(value), apic_mode(vcpu.apic_base)
    if value & reserved or new == APIC_BASE_X2APIC:
        raise MsrRefused
    if not host_initiated:
        both = APIC_BASE_ENABLE | APIC_BASE_X2APIC
        if (old == both and new == APIC_BASE_ENABLE) or (old == 0 and new == both):
            raise MsrRefused
    vcpu.apic_base = value
    if vcpu.apic is not None:
        vcpu.apic.set_base(value)


def bsp_flag(vcpu: "Vcpu") -> int:
    """Return the BSP bit of IA32_APIC_BASE for `vcpu`."""
    return APIC_BASE_BSP if vcpu.is_bsp else 0


def _get_x2apic(vcpu: "Vcpu", index: int) -> int:
    apic = vcpu.apic
    if apic is None or not apic.x2apic:
        raise MsrRefused
    value = apic.read(index - MSR_X2APIC_FIRST) if index - MSR_X2APIC_FIRST < 64 else None
    if value is None:
        raise MsrRefused
    return value


def _set_x2apic(vcpu: "Vcpu", index: int, value: int) -> None:
    apic = vcpu.apic
    if apic is None or not apic.x2apic:
        raise MsrRefused
    register = index - MSR_X2APIC_FIRST
    if register == ICR:
        done = apic.write_x2apic_icr(value)
    else:
        done = register < 64 and not value >> 32 and apic.write(register, value)
    if not done:
        raise MsrRefused


# ---- MTRRs ------------------------------------------------------------------------------------------------


def _mtrr_exists(index: int) -> bool:
    return (
        index in (MSR_MTRRCAP, MSR_MTRR_DEF_TYPE)
        or MSR_MTRR_FIRST <= index < MSR_MTRR_FIRST + 2 * MTRR_VARIABLE_COUNT
        or index in _MTRR_FIXED
    )


def _get_mtrr(vcpu: "Vcpu", index: int) -> int:
    if not _mtrr_exists(index):
        raise MsrRefused
    return MTRR_CAP if index == MSR_MTRRCAP else vcpu.msrs.get(index, 0)


def _set_mtrr(vcpu: "Vcpu", index: int, value: int) -> None:
    if not _mtrr_exists(index) or index == MSR_MTRRCAP:
        raise MsrRefused
    if index == MSR_MTRR_DEF_TYPE:
        valid = not value & ~0xCFF and value & 0xFF in _MEMORY_TYPES
    elif index in _MTRR_FIXED:
        valid = all(value >> shift & 0xFF in _MEMORY_TYPES for shift in range(0, 64, 8))
    else:
        high = ~((1 << vcpu.cpuid.maxphyaddr) - 1) & _U64
        if index & 1:
            valid = not value & (high | 0x7FF)
        else:
            valid = value & 0xFF in _MEMORY_TYPES and not value & (high | 0xF00)
    if not valid:
        raise MsrRefused
    vcpu.msrs[index] = value


# ---- machine check ----------------------------------------------------------------------------------------


def _mce_register(vcpu: "Vcpu", index: int) -> bool:
    banks = vcpu.mcg_cap & 0xFF
    if index in (MSR_IA32_MCG_CAP, MSR_IA32_MCG_STATUS):
        return True
    if index == MSR_IA32_MCG_CTL:
        return bool(vcpu.mcg_cap >> 8 & 1)
    if MSR_IA32_MC0_CTL <= index < MSR_IA32_MC0_CTL + 4 * banks:
        return True
    return MSR_IA32_MC0_CTL2 <= index < MSR_IA32_MC0_CTL2 + banks


def _has_cmci(vcpu: "Vcpu") -> bool:
    return bool(vcpu.mcg_cap >> 10 & 1)


def set_up_mce(vcpu: "Vcpu", mcg_cap: int) -> None:
    """Set the number of banks and their features; every bank reports everything (KVM_X86_SETUP_MCE)."""
    vcpu.mcg_cap = mcg_cap
    if vcpu.apic is not None:
        vcpu.apic.set_cmci(_has_cmci(vcpu))
    if mcg_cap >> 8 & 1:
        vcpu.msrs[MSR_IA32_MCG_CTL] = _U64
    for bank in range(mcg_cap & 0xFF):
        vcpu.msrs[MSR_IA32_MC0_CTL + 4 * bank] = _U64


def _set_mce(vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
    if index == MSR_IA32_MCG_CAP:
        raise MsrRefused
    if index == MSR_IA32_MCG_CTL and value not in (0, _U64):
        raise MsrRefused
    if index >= MSR_IA32_MC0_CTL:
        register = index & 3
        if register == 0 and value and value | 1 << 10 != _U64 and value | 1 << 5 | 1 << 10 != _U64:
            raise MsrRefused
        if register == 1 and not host_initiated and value:
            raise MsrRefused
    elif index >= MSR_IA32_MC0_CTL2 and (
        value & ~(1 << 30 | 0x7FFF) or (not _has_cmci(vcpu) and (value or not host_initiated))
    ):
        raise MsrRefused
    vcpu.msrs[index] = value

"""The MSRs that KVM emulates for a TD, for its TDVMCALLs and for user space (`tdx_get_msr()`, `tdx_set_msr()`)."""

from typing import TYPE_CHECKING, Final

from sim_backend.kvm import msrs
from sim_backend.kvm.msrs import MsrRefused, get_msr_common, set_msr_common

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

MSR_IA32_MCG_EXT_CTL: Final = 0x4D0
MCG_LMCE_P: Final = 1 << 27
FEAT_CTL_LOCKED: Final = 1
FEAT_CTL_LMCE_ENABLED: Final = 1 << 20
TD_EFER: Final = 0xD01  # SCE, LME, LMA, NX: what the module fixes
_SELF_IPI: Final = 0x83F
_V17_MTRR_DEF_TYPE: Final = 0x806  # write-back, enabled: the only value of v17

_X2APIC: Final = frozenset(
    {0x802, 0x803, 0x80D, 0x80F, 0x828, 0x82F, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x839, 0x83E}
)
"""ID, LVR, LDR, SPIV, ESR, LVTCMCI, ICR, the LVTs, and the timer. The rest the processor virtualises."""
_READ_ONLY: Final = frozenset({msrs.MSR_IA32_APICBASE, msrs.MSR_EFER, msrs.MSR_IA32_FEAT_CTL})
_PLAIN: Final = frozenset(
    {
        msrs.MSR_IA32_UCODE_REV,
        msrs.MSR_IA32_ARCH_CAPABILITIES,
        msrs.MSR_IA32_POWER_CTL,
        msrs.MSR_IA32_CR_PAT,
        msrs.MSR_MTRRCAP,
        msrs.MSR_MTRR_DEF_TYPE,
        msrs.MSR_IA32_TSC_DEADLINE,
        msrs.MSR_IA32_MISC_ENABLE,
        msrs.MSR_PLATFORM_INFO,
        msrs.MSR_MISC_FEATURES_ENABLES,
        msrs.MSR_KVM_POLL_CONTROL,
        msrs.MSR_IA32_MCG_CAP,
        msrs.MSR_IA32_MCG_STATUS,
        msrs.MSR_IA32_MCG_CTL,
    }
)
_MCE_BANKS: Final = 32


def has_emulated_msr(ops: "TdxOps", index: int) -> bool:
    """Tell whether `index` is in the set (`tdx_has_emulated_msr()`), which says nothing of how it behaves."""
    if index in _PLAIN or index in _READ_ONLY or index in _X2APIC:
        return True
    if msrs.MSR_MTRR_FIRST <= index <= msrs.MSR_MTRR_LAST:
        return not ops.host.is_v17
    if index == _SELF_IPI:
        return ops.host.is_v17
    return (
        msrs.MSR_IA32_MC0_CTL <= index < msrs.MSR_IA32_MC0_CTL + 4 * _MCE_BANKS
        or msrs.MSR_IA32_MC0_CTL2 <= index < msrs.MSR_IA32_MC0_CTL2 + _MCE_BANKS
    )


def get_msr(ops: "TdxOps", vcpu: "Vcpu", index: int, *, host_initiated: bool) -> int:
    """Return an MSR. Raise `MsrRefused` for one outside the set: never `MsrUnknown`, so user space hears INVAL."""
    if index == msrs.MSR_IA32_FEAT_CTL:
        return FEAT_CTL_LOCKED | (FEAT_CTL_LMCE_ENABLED if vcpu.mcg_cap & MCG_LMCE_P else 0)
    if index == MSR_IA32_MCG_EXT_CTL:
        if not host_initiated and not vcpu.mcg_cap & MCG_LMCE_P:
            raise MsrRefused
        return vcpu.msrs.get(index, 0)
    if index == msrs.MSR_EFER:
        return TD_EFER
    if not has_emulated_msr(ops, index):
        raise MsrRefused
    if ops.host.is_v17 and index == msrs.MSR_MTRRCAP:
        return 0
    try:
        return get_msr_common(vcpu, index, host_initiated)
    except msrs.MsrUnknown:
        raise MsrRefused from None


def set_msr(ops: "TdxOps", vcpu: "Vcpu", index: int, value: int, *, host_initiated: bool) -> None:
    """Set an MSR. Raise `MsrRefused` for one outside the set and for a read-only one."""
    if index == MSR_IA32_MCG_EXT_CTL:
        if (not host_initiated and not vcpu.mcg_cap & MCG_LMCE_P) or value & ~1:
            raise MsrRefused
        vcpu.msrs[index] = value
        return
    if index in _READ_ONLY or not has_emulated_msr(ops, index):
        raise MsrRefused
    if ops.host.is_v17 and index in (msrs.MSR_MTRRCAP, msrs.MSR_MTRR_DEF_TYPE):
        if index == msrs.MSR_MTRRCAP or value != _V17_MTRR_DEF_TYPE:
            raise MsrRefused
        vcpu.msrs[index] = value
        return
    try:
        set_msr_common(vcpu, index, value, host_initiated)
    except msrs.MsrUnknown:
        raise MsrRefused from None

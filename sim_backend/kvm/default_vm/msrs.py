"""MSRs of an unprotected vCPU: those that live in the CPU's state, and the vendor's few (`vmx.c`, `svm.c`)."""

from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import find_entry
from sim_backend.kvm.default_vm.guest_msrs import check_guest_read, check_guest_write
from sim_backend.kvm.hyperv_msrs import HYPERV_MSRS, get_hyperv_msr, set_hyperv_msr
from sim_backend.kvm.msrs import (
    MSR_EFER,
    MSR_IA32_FLUSH_CMD,
    MSR_IA32_PRED_CMD,
    MsrRefused,
    MsrUnknown,
    get_msr_common,
    set_msr_common,
)

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_FS_BASE: Final = 0xC000_0100
_GS_BASE: Final = 0xC000_0101
_TSC_AUX: Final = 0xC000_0103
_LAST_BRANCH: Final = range(0x1DB, 0x1DF)
_IC_CFG: Final = 0xC001_1021
_DE_CFG: Final = 0xC001_1029
_SVM: Final = 1  # KVM_STATE_NESTED_FORMAT_SVM
# MSRs that the CPU model keeps: SYSENTER, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX, DEBUGCTL.
_CPU_STATE: Final = frozenset(
    {0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102, _TSC_AUX}
)
_CANONICAL: Final = frozenset({0x175, 0x176, 0xC000_0082, 0xC000_0083, _FS_BASE, _GS_BASE, 0xC000_0102})
EFER_LMA: Final = 1 << 10
EFER_LME: Final = 1 << 8
CR0_PG: Final = 1 << 31


def is_canonical(address: int, bits: int = 48) -> bool:
    """Tell whether the upper bits of `address` all equal bit `bits` - 1."""
    top = address >> (bits - 1)
    return top in (0, (1 << (65 - bits)) - 1)


def _host_has_la57(vcpu: "Vcpu") -> bool:
    leaf = find_entry(vcpu.vm.host.profile.supported_cpuid, 7, 0)
    return leaf is not None and bool(leaf.ecx >> 16 & 1)


def get_msr(vcpu: "Vcpu", index: int, *, host_initiated: bool) -> int:
    """Return an MSR of an unprotected vCPU. Raise `MsrUnknown` or `MsrRefused`."""
    cpu = vcpu.cpu
    if cpu is None:
        raise MsrUnknown
    if not host_initiated:
        check_guest_read(vcpu, index)
    if index == MSR_EFER:
        return vcpu.read_state().efer
    if index in (_FS_BASE, _GS_BASE):
        state = vcpu.read_state()
        return state.fs.base if index == _FS_BASE else state.gs.base
    if index in _CPU_STATE:
        return vcpu.read_state().msrs.get(index, 0)
    if index in _LAST_BRANCH and vcpu.vm.host.profile.nested_format == _SVM:
        return 0  # the VMCB's, without LBR virtualization
    if index == _IC_CFG and vcpu.vm.host.profile.nested_format == _SVM and vcpu.cpuid.find(1) is not None:
        return 0
    if index == _DE_CFG and _DE_CFG in vcpu.vm.host.profile.feature_msrs:
        return vcpu.msrs.get(index, 0)
    vendor = vcpu.vm.host.profile.vendor_msrs.get(index)
    if vendor is not None:
        if not vendor.readable:
            raise MsrUnknown
        return vcpu.msrs.get(index, vendor.reset)
    if index in HYPERV_MSRS and vcpu.vm.host.profile.behaves("hyperv"):
        return get_hyperv_msr(vcpu, index, host_initiated=host_initiated)
    if index in (MSR_IA32_PRED_CMD, MSR_IA32_FLUSH_CMD):
        raise MsrUnknown
    return get_msr_common(vcpu, index, host_initiated)


def set_msr(vcpu: "Vcpu", index: int, value: int, *, host_initiated: bool) -> None:
    """Set an MSR of an unprotected vCPU. Raise `MsrUnknown` or `MsrRefused`."""
    cpu = vcpu.cpu
    if cpu is None:
        raise MsrUnknown
    if not host_initiated:
        value = check_guest_write(vcpu, index, value)
    if index == MSR_EFER:
        _set_efer(vcpu, value, host_initiated=host_initiated)
    elif index in (_FS_BASE, _GS_BASE) or index in _CPU_STATE:
        if index in _CANONICAL and not is_canonical(value, 57 if _host_has_la57(vcpu) else 48):
            raise MsrRefused
        state = vcpu.read_state()
        if index == _FS_BASE:
            state.fs.base = value
        elif index == _GS_BASE:
            state.gs.base = value
        else:
            if index == _TSC_AUX and value >> 32 and not vcpu.cpuid.vendor_is_amd:
                raise MsrRefused
            state.msrs[index] = value & 0xFFFF_FFFF if index == _TSC_AUX else value
        vcpu.write_state(state)
    elif index == _DE_CFG and _DE_CFG in vcpu.vm.host.profile.feature_msrs:
        if value & ~vcpu.vm.host.profile.feature_msrs[index]:
            raise MsrRefused
        vcpu.msrs[index] = value
    elif index in vcpu.vm.host.profile.vendor_msrs:
        rule = vcpu.vm.host.profile.vendor_msrs[index]
        if value & ~rule.writable:
            raise MsrRefused
        if rule.kept:
            vcpu.msrs[index] = value & rule.mask
    elif index in HYPERV_MSRS and vcpu.vm.host.profile.behaves("hyperv"):
        set_hyperv_msr(vcpu, index, value, host_initiated=host_initiated)
    elif index in (MSR_IA32_PRED_CMD, MSR_IA32_FLUSH_CMD):
        raise MsrUnknown
    else:
        set_msr_common(vcpu, index, value, host_initiated)


def _set_efer(vcpu: "Vcpu", value: int, *, host_initiated: bool) -> None:
    cpu = vcpu.cpu
    if cpu is None or not vcpu.vm.host.profile.efer_is_valid(value):
        raise MsrRefused
    state = vcpu.read_state()
    if not host_initiated and state.cr0 & CR0_PG and (state.efer ^ value) & EFER_LME:
        raise MsrRefused
    state.efer = value & ~EFER_LMA | state.efer & EFER_LMA
    vcpu.write_state(state)

"""Hyper-V's MSRs as user space sees them on a kernel that was built with them (`arch/x86/kvm/hyperv.c`).

They are read and written for migration. Nothing acts on them: what would reach into the guest is refused by name.
"""

import time
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import NotModelled
from sim_backend.kvm.msrs import MsrRefused

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

GUEST_OS_ID: Final = 0x4000_0000
HYPERCALL: Final = 0x4000_0001
VP_INDEX: Final = 0x4000_0002
RESET: Final = 0x4000_0003
VP_RUNTIME: Final = 0x4000_0010
TIME_REF_COUNT: Final = 0x4000_0020
REFERENCE_TSC: Final = 0x4000_0021
TSC_FREQUENCY: Final = 0x4000_0022
APIC_FREQUENCY: Final = 0x4000_0023
VP_ASSIST_PAGE: Final = 0x4000_0073
SCONTROL: Final = 0x4000_0080
SVERSION: Final = 0x4000_0081
SINT0: Final = 0x4000_0090
STIMER0_CONFIG: Final = 0x4000_00B0
CRASH_CTL: Final = 0x4000_0105
TSC_INVARIANT_CONTROL: Final = 0x4000_0118
_SYNIC: Final = frozenset({*range(SCONTROL, SCONTROL + 5), *range(SINT0, SINT0 + 16)})
_STIMERS: Final = frozenset(range(STIMER0_CONFIG, STIMER0_CONFIG + 8))
_SYNDBG: Final = frozenset({*range(0x4000_00F1, 0x4000_00F6), 0x4000_00FF})
_PARTITION_WIDE: Final = frozenset(
    {GUEST_OS_ID, HYPERCALL, RESET, TIME_REF_COUNT, REFERENCE_TSC, TSC_INVARIANT_CONTROL}
    | set(range(0x4000_0100, 0x4000_0109))
    | _SYNDBG
)
HYPERV_MSRS: Final = (
    _PARTITION_WIDE | _SYNIC | _STIMERS | {VP_INDEX, VP_RUNTIME, TSC_FREQUENCY, APIC_FREQUENCY, VP_ASSIST_PAGE}
)
_RESET_VALUES: Final = {SVERSION: 1} | dict.fromkeys(range(SINT0, SINT0 + 16), 1 << 16)
_ENABLE: Final = 1
_CRASH_NOTIFY: Final = 1 << 63
_U32: Final = (1 << 32) - 1
_INTERFACE_LEAF: Final = 0x4000_0001
_HV_1: Final = 0x3123_7648  # "Hv#1"
_NS: Final = 100  # Hyper-V counts in units of this [ns]


def _values(vcpu: "Vcpu", index: int) -> dict[int, int]:
    return vcpu.vm.msrs if index in _PARTITION_WIDE else vcpu.msrs


def get_hyperv_msr(vcpu: "Vcpu", index: int, *, host_initiated: bool) -> int:
    """Return one of `HYPERV_MSRS`. Raise `MsrRefused` for a guest that was not offered them."""
    _check_guest(vcpu, host_initiated)
    if index == TIME_REF_COUNT:
        return (time.monotonic_ns() + vcpu.vm.clock_offset_ns) // _NS
    if index == VP_RUNTIME:
        return time.thread_time_ns() // _NS + vcpu.msrs.get(index, 0)
    if index == TSC_FREQUENCY:
        return vcpu.tsc_khz * 1000
    if index == APIC_FREQUENCY:
        return 1_000_000_000 // vcpu.vm.apic_bus_cycle_ns
    default = vcpu.vm.vcpus.index(vcpu) if index == VP_INDEX else _RESET_VALUES.get(index, 0)
    return _values(vcpu, index).get(index, default)


def set_hyperv_msr(vcpu: "Vcpu", index: int, value: int, *, host_initiated: bool) -> None:
    """Set one of `HYPERV_MSRS` as KVM_SET_MSRS does. Raise `MsrRefused`, or `NotModelled`."""
    _check_guest(vcpu, host_initiated)
    values = _values(vcpu, index)
    if index == TIME_REF_COUNT or (index in _SYNIC | _STIMERS and value):
        raise MsrRefused  # the SynIC is off until KVM_CAP_HYPERV_SYNIC
    if index in (TSC_FREQUENCY, APIC_FREQUENCY):
        return
    if index == HYPERCALL:
        if not values.get(GUEST_OS_ID):
            return  # stays disabled until the guest says who it is
        _check_page(vcpu, value, "hypercall page")
    elif index == VP_ASSIST_PAGE:
        _check_page(vcpu, value, "VP assist page")
    elif index == GUEST_OS_ID and not value and HYPERCALL in values:
        values[HYPERCALL] &= ~_ENABLE
    elif index == VP_INDEX:
        value &= _U32
        if value >= vcpu.vm.host.profile.max_vcpus:
            raise MsrRefused
    elif index == VP_RUNTIME:
        value -= time.thread_time_ns() // _NS
    elif index == CRASH_CTL:
        value &= _CRASH_NOTIFY
    elif index == TSC_INVARIANT_CONTROL and value & ~_ENABLE:
        raise MsrRefused
    elif index == RESET:
        if value == 1:
            raise NotModelled("a reset by HV_X64_MSR_RESET")
        return
    values[index] = value


def _check_guest(vcpu: "Vcpu", host_initiated: bool) -> None:
    if host_initiated:
        return
    interface = vcpu.cpuid.find(_INTERFACE_LEAF)
    if interface is not None and interface.eax == _HV_1:
        raise NotModelled("a guest that uses Hyper-V's interface")
    raise MsrRefused


def _check_page(vcpu: "Vcpu", value: int, what: str) -> None:
    if value & _ENABLE:
        if vcpu.vm.find_memslot(value >> 12) is None:
            raise MsrRefused
        raise NotModelled(f"Hyper-V's {what}, switched on by MSR value {value:#x}")

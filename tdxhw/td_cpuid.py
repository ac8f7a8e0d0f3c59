"""The CPUID tables of a TD: what KVM_TDX_INIT_VM configures, and what KVM_SET_CPUID2 then says.

Mainline takes only leaves that the module can configure, and only bits that KVM_TDX_CAPABILITIES shows
(`arch/x86/kvm/vmx/tdx.c`, setup_tdparams_cpuids). v17 takes any table, masks it silently, derives XFAM and GPAW
from it, and later wants the same values in KVM_SET_CPUID2.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from uapi_ctypes.kvm_state import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KvmCpuidEntry2

_PHYS_ADDR_LEAF: Final = 0x8000_0008
_XSAVE_LEAF: Final = 0xD
_FEATURES_LEAF: Final = 1
_X2APIC: Final = 1 << 21
"""CPUID.1:ECX; without it INIT_VCPU cannot set the APIC base."""
_XSS_BITS: Final = 1 << 8 | 1 << 11 | 1 << 12
"""PT and CET: the XFAM bits that live in IA32_XSS."""


def copy_entry(entry: KvmCpuidEntry2) -> KvmCpuidEntry2:
    """Return a copy that can be changed."""
    return KvmCpuidEntry2.from_buffer_copy(entry)


def find(entries: Iterable[KvmCpuidEntry2], function: int, index: int = 0) -> KvmCpuidEntry2 | None:
    """Return the entry for leaf `function`, sub-leaf `index`, as KVM would find it."""
    for entry in entries:
        significant = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        if entry.function == function and (not significant or entry.index == index):
            return entry
    return None


def mainline_init_vm(
    configurable: Sequence[KvmCpuidEntry2], supported: Sequence[KvmCpuidEntry2], gpaw: int
) -> list[KvmCpuidEntry2]:
    """Return the list for INIT_VM: each configurable leaf with what the host supports of it.

    Every entry gets SIGNIFICANT_INDEX: one without matches every sub-leaf of its function, and INIT_VM then counts
    one match too many (EINVAL). CAPABILITIES itself never sets the flag.
    """
    table = []
    for mask in configurable:
        host = find(supported, mask.function, mask.index)
        made = KvmCpuidEntry2(mask.function, mask.index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
        if host is not None:
            made.eax, made.ebx = host.eax & mask.eax, host.ebx & mask.ebx
            made.ecx, made.edx = host.ecx & mask.ecx, host.edx & mask.edx
        if mask.function == _PHYS_ADDR_LEAF:
            made.eax = made.eax & ~0xFF_0000 | gpaw << 16
        table.append(made)
    return table


def v17_table(supported: Sequence[KvmCpuidEntry2], gpaw: int, xfam: int) -> list[KvmCpuidEntry2]:
    """Return the one table that v17 gets in INIT_VM and in SET_CPUID2."""
    table = [copy_entry(entry) for entry in supported]
    for entry in table:
        if entry.function == _PHYS_ADDR_LEAF:
            entry.eax = entry.eax & ~0xFF | gpaw
        elif entry.function == _FEATURES_LEAF:
            entry.ecx |= _X2APIC
        elif entry.function == _XSAVE_LEAF and entry.index == 0:
            entry.eax, entry.edx = xfam & ~_XSS_BITS & 0xFFFF_FFFF, xfam >> 32
        elif entry.function == _XSAVE_LEAF and entry.index == 1:
            entry.ecx, entry.edx = xfam & _XSS_BITS, 0
    return table


def mainline_set_cpuid(virtual: Sequence[KvmCpuidEntry2]) -> list[KvmCpuidEntry2]:
    """Return the table for SET_CPUID2 from what KVM_TDX_GET_CPUID read back from the module."""
    table = [copy_entry(entry) for entry in virtual]
    for entry in table:
        if entry.function == _FEATURES_LEAF:
            entry.ecx |= _X2APIC
    return table

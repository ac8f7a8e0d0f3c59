"""CPUID tables: what user space sets, what is looked up in them (`arch/x86/kvm/cpuid.c`)."""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_MAX_CPUID_ENTRIES: Final = 256
KVM_CPUID_FLAG_SIGNIFICANT_INDEX: Final = 1
_ENTRY2: Final = struct.Struct("<7I12x")
ENTRY2_BYTES: Final = _ENTRY2.size  # struct kvm_cpuid_entry2


class CpuidEntry(NamedTuple):
    """``struct kvm_cpuid_entry2`` without its padding."""

    function: int
    index: int  # type: ignore[assignment]  # the structure has a field of the name of a tuple method
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    def pack(self) -> bytes:
        """Return the 40 bytes of the structure."""
        return _ENTRY2.pack(*self)


def unpack_entries(data: bytes) -> list[CpuidEntry]:
    """Return the entries in an array of ``struct kvm_cpuid_entry2``."""
    return [CpuidEntry(*fields) for fields in _ENTRY2.iter_unpack(data)]


def find_entry(entries: Sequence[CpuidEntry], function: int, index: int) -> CpuidEntry | None:
    """Return the first entry that answers CPUID(function, index), or None (kvm_find_cpuid_entry2)."""
    for entry in entries:
        if entry.function == function and (not entry.flags & KVM_CPUID_FLAG_SIGNIFICANT_INDEX or entry.index == index):
            return entry
    return None


class VcpuCpuid:
    """One vCPU's table, and what KVM derives from it once, when it is set."""

    __slots__ = ("_lookup", "entries", "has_x2apic", "has_xsaves", "max_gfn_bits", "maxphyaddr", "vendor_is_amd")

    def __init__(self, entries: Sequence[CpuidEntry]) -> None:
        self.entries: Final = tuple(entries)
        self._lookup: dict[tuple[int, int], CpuidEntry | None] = {}
        top = self.find(0x8000_0000)
        size = self.find(0x8000_0008) if top is not None and top.eax >= 0x8000_0008 else None
        self.maxphyaddr = size.eax & 0xFF if size is not None else 36  # [bits]
        self.max_gfn_bits = size.eax >> 16 & 0xFF if size is not None else 0  # [bits] guest-physical size
        features = self.find(1)
        self.has_x2apic = features is not None and bool(features.ecx >> 21 & 1)
        state = self.find(0xD, 1)
        self.has_xsaves = state is not None and bool(state.eax >> 3 & 1)
        vendor = self.find(0)
        self.vendor_is_amd = vendor is not None and vendor.ebx in (0x68747541, 0x6F677948)  # "Auth", "Hygo"

    def find(self, function: int, index: int = 0) -> CpuidEntry | None:
        """Return the entry for CPUID(function, index) exactly, or None."""
        key = (function, index)
        try:
            return self._lookup[key]
        except KeyError:
            entry = self._lookup[key] = find_entry(self.entries, function, index)
            return entry

    def has(self, function: int, register: str, bit: int) -> bool:
        """Tell whether a feature bit is set."""
        entry = self.find(function)
        return entry is not None and bool(getattr(entry, register) >> bit & 1)

    def efer_unsupported(self) -> int:
        """Return the EFER bits for which the table has no feature (__kvm_valid_efer)."""
        extended, more = self.find(0x8000_0001), self.find(0x8000_0021)
        ecx, edx = (extended.ecx, extended.edx) if extended is not None else (0, 0)
        unsupported = 0
        if not edx >> 29 & 1:
            unsupported |= 1 << 8 | 1 << 10  # LME, LMA: long mode
        if not edx >> 20 & 1:
            unsupported |= 1 << 11  # NX
        if not ecx >> 2 & 1:
            unsupported |= 1 << 12  # SVME
        if not edx >> 25 & 1:
            unsupported |= 1 << 14  # FFXSR
        if more is None or not more.eax >> 8 & 1:
            unsupported |= 1 << 21  # AUTOIBRS
        return unsupported

    def cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """Return EAX, EBX, ECX, EDX as the CPUID instruction would (kvm_cpuid, with out-of-range rules)."""
        entry = self.find(function, index)
        if entry is None:
            entry = self._out_of_range(function, index)
        if entry is None:
            return 0, 0, 0, 0
        return entry.eax, entry.ebx, entry.ecx, entry.edx

    def _out_of_range(self, function: int, index: int) -> CpuidEntry | None:
        basic = self.find(0)
        if basic is None or self.vendor_is_amd:
            return None
        if 0x4000_0000 <= function <= 0x4FFF_FFFF:
            limit = self.find(function & 0xFFFF_FF00)
        elif function >= 0xC000_0000:
            limit = self.find(0xC000_0000)
        else:
            limit = self.find(function & 0x8000_0000)
        if limit is not None and function <= limit.eax:
            return None
        # Intel's rule: above the maximum, answer as the highest basic leaf does.
        return self.find(basic.eax, index)


CR4_OSXSAVE: Final = 1 << 18
CR4_PKE: Final = 1 << 22
_CPUID1_ECX_XSAVE: Final = 1 << 26
_CPUID1_ECX_OSXSAVE: Final = 1 << 27
_CPUID1_ECX_MWAIT: Final = 1 << 3
_CPUID1_EDX_APIC: Final = 1 << 9
_CPUID7_ECX_PKU: Final = 1 << 3
_CPUID7_ECX_OSPKE: Final = 1 << 4
_CPUIDD1_EAX_XSAVEC: Final = 1 << 1
_CPUIDD1_EAX_XSAVES: Final = 1 << 3
_CPUIDD_ECX_ALIGNED: Final = 1 << 1
_APIC_BASE_ENABLE: Final = 1 << 11


def with_runtime_bits(vcpu: "Vcpu") -> tuple[CpuidEntry, ...]:
    """Return the vCPU's table with the bits that mirror its control registers (kvm_update_cpuid_runtime)."""
    cpu = vcpu.cpu
    entries = list(vcpu.cpuid.entries)
    state = cpu.get_state() if cpu is not None else None
    cr4 = state.cr4 if state is not None else 0
    for position, entry in enumerate(entries):
        if entry.function == 1:
            ecx, edx = entry.ecx, entry.edx
            if ecx & _CPUID1_ECX_XSAVE:
                ecx = ecx & ~_CPUID1_ECX_OSXSAVE | (_CPUID1_ECX_OSXSAVE if cr4 & CR4_OSXSAVE else 0)
            edx = edx & ~_CPUID1_EDX_APIC | (_CPUID1_EDX_APIC if vcpu.apic_base & _APIC_BASE_ENABLE else 0)
            entries[position] = entry._replace(ecx=ecx, edx=edx)
        elif entry.function == 7 and entry.index == 0 and entry.ecx & _CPUID7_ECX_PKU:
            ecx = entry.ecx & ~_CPUID7_ECX_OSPKE | (_CPUID7_ECX_OSPKE if cr4 & CR4_PKE else 0)
            entries[position] = entry._replace(ecx=ecx)
        elif entry.function == 0xD and entry.index == 0:
            xcr0 = state.xcr0 if state is not None else 1
            entries[position] = entry._replace(ebx=xstate_size(entries, xcr0))
        elif entry.function == 0xD and entry.index == 1 and entry.eax & (_CPUIDD1_EAX_XSAVEC | _CPUIDD1_EAX_XSAVES):
            xcr0 = state.xcr0 if state is not None else 1
            entries[position] = entry._replace(ebx=compacted_xstate_size(entries, xcr0))
    return tuple(entries)


def xstate_size(entries: Sequence[CpuidEntry], xcr0: int) -> int:
    """Return the standard-format XSAVE size for the features in `xcr0` [bytes]."""
    size = 576
    for entry in entries:
        if entry.function == 0xD and entry.index >= 2 and xcr0 >> entry.index & 1:
            size = max(size, entry.eax + entry.ebx)
    return size


def compacted_xstate_size(entries: Sequence[CpuidEntry], features: int) -> int:
    """Return the compacted-format XSAVE size for the components in `features` [bytes]."""
    size = 576
    for entry in entries:
        if entry.function == 0xD and entry.index >= 2 and features >> entry.index & 1:
            if entry.ecx & _CPUIDD_ECX_ALIGNED:
                size = -(-size // 64) * 64
            size += entry.eax
    return size


def with_forced_bits(entries: Sequence[CpuidEntry], forced: Sequence[Sequence[int]]) -> list[CpuidEntry]:
    """Return `entries` with the bits that this kernel keeps as the CPU has them (kvm_pvm: CPUID does not exit).

    Each of `forced` is function, index, then mask and value of EAX, EBX, ECX and EDX.
    """
    rules = {(function, index): words for function, index, *words in forced}
    made = []
    for entry in entries:
        words = rules.get((entry.function, entry.index))
        if words is not None:
            old = (entry.eax, entry.ebx, entry.ecx, entry.edx)
            eax, ebx, ecx, edx = (
                value & ~words[2 * at] | words[2 * at + 1] & words[2 * at] for at, value in enumerate(old)
            )
            entry = entry._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        made.append(entry)
    return made


# CR4 bits that a guest may set only when its CPUID table has the feature: (CR4 bit, leaf, register, bit).
_CR4_FEATURES: Final = (
    (13, 1, "ecx", 5),  # VMXE
    (16, 7, "ebx", 0),  # FSGSBASE
    (17, 1, "ecx", 17),  # PCIDE
    (18, 1, "ecx", 26),  # OSXSAVE
    (20, 7, "ebx", 7),  # SMEP
    (21, 7, "ebx", 20),  # SMAP
    (22, 7, "ecx", 3),  # PKE
    (11, 7, "ecx", 2),  # UMIP
    (12, 7, "ecx", 16),  # LA57
)
_CR4_ALWAYS: Final = 0x7FF & ~(1 << 11)


def cr4_reserved_bits(cpuid: VcpuCpuid) -> int:
    """Return the CR4 bits that are reserved for a vCPU with this table."""
    allowed = _CR4_ALWAYS
    for bit, leaf, register, position in _CR4_FEATURES:
        entry = cpuid.find(leaf)
        if entry is not None and getattr(entry, register) >> position & 1:
            allowed |= 1 << bit
    return ~allowed & ((1 << 64) - 1)

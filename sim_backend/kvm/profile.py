"""A host profile: everything by which one kernel on one machine differs from another, as data.

Profiles are YAML files in ``profiles/``. ``inherits`` names a profile to start from; mappings are merged key by
key, lists and scalars replace, and ``behaviours`` is a mapping from a name that says what the kernel does to true
or false, so that a child can take one back. No code compares kernel versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Final

import yaml

from sim_backend.kvm.cpuid import CpuidEntry

BEHAVIOURS: Final = frozenset(
    {
        # -- generic KVM
        "create_vcpu_eexist_last",  # a duplicate vCPU id is reported after every other check (before 7.3)
        "create_irqchip_on_td",  # KVM_CREATE_IRQCHIP on a TD succeeds, creating a vCPU then fails (6.16)
        "gmem_bound_before_limit",  # gmem range bound twice: EEXIST before the S-bit / limit EINVAL (before 7.3)
        "gmem_bound_is_einval",  # gmem range bound twice: EINVAL, not EEXIST (before 7.2)
        "read_fault_maps_writable",  # a read fault maps a writable page writable, and logs it as dirty (TDP)
        "one_reg",  # KVM_GET_ONE_REG and KVM_SET_ONE_REG (after 6.16)
        "sregs_checks_efer",  # KVM_SET_SREGS refuses an EFER that the CPUID table does not allow (after 6.18)
        "segments_of_vmcb",  # KVM_GET_SREGS shows what an AMD VMCB keeps of a segment register (svm_get_segment)
        "hyperv",  # KVM_HYPERV is built in: its MSRs can be read and written
        "shadow_paging",  # no second-level paging: a guest-physical address has 52 bits, whatever the CPU has (kvm_pvm)
        "shutdown_resets_vcpu",  # a triple fault puts the vCPU into the INIT state (SVM)
        "one_interrupt_shadow",  # STI and MOV SS shadows cannot be told apart (SVM)
        "interprets_guest_code",  # CPL-0 code runs in KVM's instruction emulator (kvm_pvm)
        "x2apic_suppress_eoi_flags",  # KVM_CAP_X2APIC_API knows bits 2 and 3 (after 6.16)
        "memory_attributes",  # KVM_SET_MEMORY_ATTRIBUTES is built in
        "pre_fault_memory",  # KVM_PRE_FAULT_MEMORY is built in
        "guest_memfd_flags",  # MMAP and INIT_SHARED exist
        "ip_wraps",  # 16-bit code that runs past 64 KiB goes on at IP 0 (QEMU's CPU; others raise #GP)
        "smm",  # KVM_SMM is built in
        "pmu_capability_zero_is_einval",  # KVM_CAP_PMU_CAPABILITY wants exactly DISABLE (7.2, 7.3; 6.18 takes 0)
        "mapgpa_ret_codes",  # hypercall.ret of MapGPA: EAGAIN retries, EINVAL fails (after 6.16)
        "cap_max_vcpus_settable",  # KVM_ENABLE_CAP(KVM_CAP_MAX_VCPUS) (v17)
        # -- TDX, see sim_backend.kvm.tdx
        "tdx_command_locks_all_vcpus",  # kvm->lock, every vCPU mutex, slots_lock (after 6.16)
        "tdx_vcpu_creation_in_flight_is_ebusy",
        "tdx_capabilities_written_back",
        "tdx_prologue_hkid_before_fault",
        "tdx_finalize_checks_premapped",
        "tdx_populated_page_is_eexist",
        "tdx_page_add_busy_is_ebusy",
        "tdx_page_add_error_does_not_bug",
        "tdx_source_zero_is_eopnotsupp",
        "tdx_source_zero_is_ordinary",
        "tdx_notify_and_bus_lock_exits",
        "tdx_pre_fault_consumes_vm_dead",
    }
)
"""Every behaviour that a profile may name."""


@dataclass(frozen=True, slots=True)
class VendorMsr:
    """An MSR that the vendor code keeps as a plain value."""

    reset: int = 0
    writable: int = (1 << 64) - 1  # a write with any other bit is refused
    readable: bool = True
    mask: int = (1 << 64) - 1  # what is kept of a write
    kept: bool = True  # False: a write is accepted and forgotten


@dataclass(frozen=True)
class HostProfile:
    """One simulated host's kernel and what it found at boot."""

    name: str
    kernel_release: str
    dialect: str  # mainline | v17
    tdx_module: str  # 1.5.01 | mainline-host | none
    n_cpus: int
    packages: int
    ram_bytes: int
    max_vcpus: int
    max_vcpu_ids: int
    tsc_khz: int  # [kHz]
    max_tsc_khz: int  # [kHz] highest guest frequency, exclusive
    host_phys_bits: int  # [bits] MAXPHYADDR, KeyID bits included
    five_level_ept: bool
    private_hkids: int
    default_mcg_cap: int
    vm_types: Mapping[int, str]  # KVM_CREATE_VM type -> default | sw_protected | tdx
    capabilities: Mapping[int, int]  # KVM_CHECK_EXTENSION on /dev/kvm; absent means 0
    vm_capabilities: Mapping[int, Mapping[int, int]]  # VM type -> what its fd answers differently
    supported_cpuid: tuple[CpuidEntry, ...]
    emulated_cpuid: tuple[CpuidEntry, ...]
    msr_index_list: tuple[int, ...]
    msr_feature_index_list: tuple[int, ...]
    feature_msrs: Mapping[int, int]
    vendor_msrs: Mapping[int, VendorMsr]
    hypercall_instruction: str  # vmcall | vmmcall: the CPU's own; KVM rewrites the other one in the guest
    debug_exit_dr7: int  # what KVM_EXIT_DEBUG shows for DR7 of a guest that uses none
    mxcsr_mask: int  # of the host's FPU, as XSAVE areas show it
    xsave_software: int  # bytes 464-471 of an XSAVE area: the host's user features
    cr4_always: int  # CR4 bits that a guest may set whatever its CPUID table says
    rflags_kept: int  # bits of RFLAGS that KVM_SET_REGS keeps
    msr_reset: Mapping[int, int]  # reset values that differ from the architectural ones
    hyperv_cpuid: tuple[CpuidEntry, ...]  # empty: the system-wide query does not exist
    mce_cap_supported: int
    xcomp_guest_supported: int
    efer_valid: int  # bits of EFER that guests may set
    guest_debug_mask: int  # KVM_GUESTDBG_* that KVM_SET_GUEST_DEBUG accepts
    clock_flags: int  # KVM_GET_CLOCK
    nested_format: int  # 0 VMX, 1 SVM
    has_vfio: bool
    segment_reset_types: Mapping[str, int]  # how the vendor shows data segments, SS, TR and LDTR after reset
    cpuid_forced: tuple[tuple[int, ...], ...]  # see `sim_backend.kvm.cpuid.with_forced_bits`
    behaviours: frozenset[str]
    raw: Mapping[str, Any] = field(repr=False, compare=False)  # the merged file, for parts with their own keys

    def efer_is_valid(self, efer: int) -> bool:
        """Tell whether a guest may have this EFER value."""
        return not efer & ~self.efer_valid

    def tsc_khz_is_close(self, khz: int) -> bool:
        """Tell whether `khz` is within the 250 ppm for which KVM does not bother to scale."""
        return abs(khz - self.tsc_khz) * 1_000_000 <= self.tsc_khz * 250

    def behaves(self, behaviour: str) -> bool:
        """Tell whether the kernel has `behaviour`; raise ``KeyError`` on one that no profile may name."""
        if behaviour not in BEHAVIOURS:
            raise KeyError(behaviour)
        return behaviour in self.behaviours


@lru_cache
def profile_names() -> tuple[str, ...]:
    """Return the names of the profiles that come with the simulator."""
    return tuple(
        sorted(
            entry.name.removesuffix(".yaml")
            for entry in files("sim_backend.kvm.profiles").iterdir()
            if entry.name.endswith(".yaml") and not entry.name.startswith("_")
        )
    )


def load_profile(name: str, **overrides: Any) -> HostProfile:
    """Read the profile `name`, with single keys replaced. Raise ``FileNotFoundError`` or ``ValueError``."""
    return profile_from(_merge(_read(name), overrides), name)


def merged_profile(name: str, changes: Mapping[str, Any]) -> HostProfile:
    """Return the profile `name` with `changes` merged in, one level of mappings deep where they are mappings.

    ``vm_types`` and ``vm_capabilities`` are replaced whole: they are lists of what there is.
    """
    base = dict(_read(name))
    for key in ("vm_types", "vm_capabilities"):
        if key in changes:
            base.pop(key, None)
    return profile_from(_merge(base, changes), name)


def profile_from(data: Mapping[str, Any], name: str) -> HostProfile:
    """Make a profile of already merged data. Raise ``ValueError`` naming a key that is missing or unknown."""
    unknown = set(data["behaviours"]) - BEHAVIOURS
    if unknown:
        raise ValueError(f"profile {name}: unknown behaviours {sorted(unknown)}")
    try:
        return HostProfile(
            name=name,
            kernel_release=str(data["kernel_release"]),
            dialect=data["dialect"],
            tdx_module=data["tdx_module"],
            n_cpus=data["n_cpus"],
            packages=data["packages"],
            ram_bytes=data["ram_bytes"],
            max_vcpus=data["max_vcpus"],
            max_vcpu_ids=data["max_vcpu_ids"],
            tsc_khz=data["tsc_khz"],
            max_tsc_khz=data["max_tsc_khz"],
            host_phys_bits=data["host_phys_bits"],
            five_level_ept=data["five_level_ept"],
            private_hkids=data["private_hkids"],
            default_mcg_cap=data["default_mcg_cap"],
            vm_types=data["vm_types"],
            capabilities=data["capabilities"],
            vm_capabilities=data["vm_capabilities"],
            supported_cpuid=tuple(CpuidEntry(*entry) for entry in data["supported_cpuid"]),
            emulated_cpuid=tuple(CpuidEntry(*entry) for entry in data["emulated_cpuid"]),
            msr_index_list=tuple(data["msr_index_list"]),
            msr_feature_index_list=tuple(data["msr_feature_index_list"]),
            feature_msrs=data["feature_msrs"],
            vendor_msrs={index: VendorMsr(**rule) for index, rule in data["vendor_msrs"].items()},
            hypercall_instruction=data["hypercall_instruction"],
            debug_exit_dr7=data["debug_exit_dr7"],
            mxcsr_mask=data["mxcsr_mask"],
            xsave_software=data["xsave_software"],
            cr4_always=data["cr4_always"],
            rflags_kept=data["rflags_kept"],
            msr_reset=data["msr_reset"],
            hyperv_cpuid=tuple(CpuidEntry(*entry) for entry in data["hyperv_cpuid"]),
            mce_cap_supported=data["mce_cap_supported"],
            xcomp_guest_supported=data["xcomp_guest_supported"],
            efer_valid=data["efer_valid"],
            guest_debug_mask=data["guest_debug_mask"],
            clock_flags=data["clock_flags"],
            nested_format=data["nested_format"],
            has_vfio=data["has_vfio"],
            segment_reset_types=data["segment_reset_types"],
            cpuid_forced=tuple(tuple(entry) for entry in data.get("cpuid_forced", ())),
            behaviours=frozenset(key for key, value in data["behaviours"].items() if value),
            raw=data,
        )
    except KeyError as missing:
        raise ValueError(f"profile {name}: key {missing} is missing") from None


@lru_cache
def _read(name: str) -> dict[str, Any]:
    text = (files("sim_backend.kvm.profiles") / f"{name}.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - safe
    parent = data.pop("inherits", None)
    return _merge(_read(parent), data) if parent else data


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged

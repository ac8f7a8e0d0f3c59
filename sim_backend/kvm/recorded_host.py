"""The profile of a host that was recorded or probed: a base for its kind of kernel, and what it said of itself.

``host.json`` beside a recording holds the kernel release, every capability, the CPUID tables and both MSR lists.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sim_backend.kvm.profile import HostProfile, merged_profile, profile_names

_BASES: Final = {"kvm_amd": "svm", "kvm_pvm": "pvm"}
_INTEL_BASES: Final = {"v17": "v17", "mainline": "mainline", "none": "mainline"}
"""By TDX dialect, where no profile is of the host's own release."""
_VM_TYPE_NAMES: Final = {0: "default", 1: "sw_protected"}
_PROCESSOR_SIZE: Final = "address sizes"
_EAX, _EBX, _ECX, _EDX = range(4)
_RUNTIME_BITS: Final = {
    (1, 0, _EBX): 0xFF00_0000,  # the APIC id of the CPU that was asked
    (1, 0, _ECX): 1 << 27,  # OSXSAVE
    (1, 0, _EDX): 1 << 9,  # APIC
    (7, 0, _ECX): 1 << 4,  # OSPKE
    (0xD, 1, _EBX): 0xFFFF_FFFF,  # size of the state in use
}
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_MAX_VCPU_ID: Final = 128


def profile_of_recording(path: Path) -> HostProfile:
    """Return the profile for the recording at `path`, from ``host.json`` beside it or from the name of its folder."""
    description = path.parent / "host.json"
    if description.exists():
        return profile_of_host(json.loads(description.read_text(encoding="utf-8")))
    base = "pvm" if "pvm" in path.parent.name else "svm"
    return merged_profile(base, {})


def profile_of_host(host: Mapping[str, Any]) -> HostProfile:
    """Return the profile of a host that described itself as ``host.json`` does.

    A simulated host names its ``profile`` and is that. Raise ``KeyError`` or ``ValueError`` on a malformed description.
    """
    if "profile" in host:
        if host["profile"] not in profile_names():
            raise ValueError(f"there is no profile {host['profile']!r}")
        return merged_profile(host["profile"], {})
    base = _base_of(host)
    system = {int(cap): value for cap, value in host["caps_system"].items() if value}
    types = {int(number): kind for number, kind in host["vm_types"].items()}
    type_names = {**merged_profile(base, {}).vm_types, **_VM_TYPE_NAMES}
    changes: dict[str, Any] = {
        "kernel_release": host["kernel"],
        "capabilities": dict.fromkeys(merged_profile(base, {}).capabilities, 0) | system,
        "vm_capabilities": {
            number: {
                int(cap): value for cap, value in kind.get("caps_vm", {}).items() if value != system.get(int(cap), 0)
            }
            for number, kind in types.items()
        },
        "vm_types": {number: type_names[number] for number in types if number in type_names},
        "supported_cpuid": [[int(word, 16) for word in entry] for entry in host["KVM_GET_SUPPORTED_CPUID"]["entries"]],
        "msr_index_list": [int(index, 16) for index in host["KVM_GET_MSR_INDEX_LIST"]["indices"]],
        "msr_feature_index_list": [int(index, 16) for index in host["KVM_GET_MSR_FEATURE_INDEX_LIST"]["indices"]],
        "n_cpus": max(system.get(KVM_CAP_NR_VCPUS, 1), 1),
        "max_vcpus": system.get(KVM_CAP_MAX_VCPUS, 1024),
        "max_vcpu_ids": system.get(KVM_CAP_MAX_VCPU_ID, 4096),
    }
    if "tdx" not in changes["vm_types"].values():
        changes["tdx_module"] = "none"
    if "KVM_GET_EMULATED_CPUID" in host:
        entries = host["KVM_GET_EMULATED_CPUID"]["entries"]
        changes["emulated_cpuid"] = [[int(word, 16) for word in entry] for entry in entries]
    if "KVM_GET_CPUID2" in host:
        read_back = [[int(word, 16) for word in entry] for entry in host["KVM_GET_CPUID2"]["entries"]]
        changes["cpuid_forced"] = list(_forced_bits(changes["supported_cpuid"], read_back))
    if "feature_msrs" in host:
        changes["feature_msrs"] = {int(index, 16): int(value, 16) for index, value in host["feature_msrs"].items()}
    if "tsc_khz" in host:
        changes["tsc_khz"] = host["tsc_khz"]
    sizes = host.get("cpu", {}).get(_PROCESSOR_SIZE, "")
    if sizes.split(" ", 1)[0].isdigit():
        changes["host_phys_bits"] = int(sizes.split(" ", 1)[0])
    return merged_profile(base, changes)


def _forced_bits(given: list[list[int]], read_back: list[list[int]]) -> Iterator[list[int]]:
    """Yield what a vCPU's table shows otherwise than it was set, less the bits that mirror its control registers."""
    kept = {(function, index): words for function, index, _flags, *words in read_back}
    for function, index, _flags, *words in given:
        seen = kept.get((function, index))
        if seen is None or (function, index) == (0xD, 0):
            continue
        forced = [function, index]
        for register, (old, new) in enumerate(zip(words, seen, strict=True)):
            mask = (old ^ new) & ~_RUNTIME_BITS.get((function, index, register), 0)
            forced += [mask, new & mask]
        if any(forced[2:]):
            yield forced


def _base_of(host: Mapping[str, Any]) -> str:
    """Return the profile to start from: the vendor module says which kind of kernel, the release which of its kind."""
    modules = host.get("kvm_modules", [])
    if "kvm_intel" in modules:
        release = ".".join(host["kernel"].split(".")[:2])
        dialect = host.get("dialect", "none")
        return release if release in profile_names() and dialect != "v17" else _INTEL_BASES[dialect]
    return next((_BASES[module] for module in modules if module in _BASES), "svm")

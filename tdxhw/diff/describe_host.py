"""What a kernel says of itself: enough to make a simulated host that has the same equipment.

The shape is that of ``host.json`` beside the recordings in ``tests/golden/kvm``.
"""

import platform
from pathlib import Path
from typing import Any, Final

from tdxhw.host import Host
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2, KvmMsrEntry, KvmMsrList, KvmMsrs
from uapi_ctypes.vm import Vm

_CAPABILITIES: Final = range(256)
"""KVM_CAP_* are numbered densely from 0; the highest in use is below."""
_CPUID_ROOM: Final = 256
_MSR_ROOM: Final = 2048
_LEAF_ADDRESS_SIZES: Final = 0x8000_0008
_MODULES: Final = ("kvm_intel", "kvm_amd", "kvm_pvm")


def describe_host(host: Host) -> dict[str, Any]:
    """Ask the kernel of `host` for capabilities, CPUID, MSR lists and VM types. Raise `KvmError`."""
    provenance = host.provenance()
    with Kvm(host.kernel) as kvm:
        cpuid = kvm.get_supported_cpuid(_CPUID_ROOM)
        features = _indices(kvm, feature=True)
        found: dict[str, Any] = {
            "kernel": platform.release() if not host.simulated else provenance.get("kernel", "").split()[-1],
            "dialect": provenance.get("dialect", "none"),
            "cpu": {"model name": provenance.get("cpu", ""), "address sizes": _address_sizes(cpuid)},
            "api_version": kvm.get_api_version(),
            "vcpu_mmap_size": kvm.get_vcpu_mmap_size(),
            "caps_system": {str(cap): kvm.check_extension(cap) for cap in _CAPABILITIES},
            "vm_types": {},
            "KVM_GET_SUPPORTED_CPUID": _table(cpuid),
            "KVM_GET_EMULATED_CPUID": _table(kvm.get_emulated_cpuid(_CPUID_ROOM)),
            "KVM_GET_MSR_INDEX_LIST": _list(_indices(kvm, feature=False)),
            "KVM_GET_MSR_FEATURE_INDEX_LIST": _list(features),
            "feature_msrs": {hex(index): hex(value) for index, value in _values(kvm, features).items()},
        }
        types = kvm.check_extension(KvmCap.KVM_CAP_VM_TYPES) or 1  # a kernel before the bitmap has type 0 only
        for number in range(types.bit_length()):
            if types >> number & 1:
                with kvm.create_vm(number) as vm:
                    caps = {str(cap): vm.check_extension(cap) for cap in _CAPABILITIES}
                    found["vm_types"][str(number)] = {"caps_vm": caps}
                    if number == 0:
                        found["tsc_khz"] = vm.get_tsc_khz()
                        found["KVM_GET_CPUID2"] = _read_back(vm, cpuid)
    if host.simulated:
        found["profile"] = provenance["profile"]
    else:
        found["kvm_modules"] = [name for name in _MODULES if Path("/sys/module", name).exists()]
    return found


def _read_back(vm: Vm, cpuid: KvmCpuid2) -> dict[str, Any]:
    """Return what a vCPU makes of `cpuid`: kvm_pvm shows some of the CPU's own bits."""
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid2(cpuid)
    return _table(vcpu.get_cpuid2(_CPUID_ROOM))


def _table(cpuid: KvmCpuid2) -> dict[str, Any]:
    entries = [
        [hex(getattr(entry, name)) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")]
        for entry in cpuid.filled()
    ]
    return {"nent": len(entries), "entries": entries}


def _list(indices: list[int]) -> dict[str, Any]:
    return {"nmsrs": len(indices), "indices": [hex(index) for index in indices]}


def _indices(kvm: Kvm, *, feature: bool) -> list[int]:
    msrs = KvmMsrList.allocate(_MSR_ROOM)
    (kvm.get_msr_feature_index_list if feature else kvm.get_msr_index_list)(msrs)
    return msrs.filled()


def _values(kvm: Kvm, indices: list[int]) -> dict[int, int]:
    """Return the feature MSRs that can be read: a list may hold some that this CPU lacks."""
    found = {}
    for index in indices:
        msrs = KvmMsrs.of([KvmMsrEntry(index)])
        try:
            if kvm.get_msrs(msrs):
                found[index] = msrs.entries[0].data
        except KvmError:
            continue
    return found


def _address_sizes(cpuid: KvmCpuid2) -> str:
    for entry in cpuid.filled():
        if entry.function == _LEAF_ADDRESS_SIZES:
            return f"{entry.eax & 0xFF} bits physical, {entry.eax >> 8 & 0xFF} bits virtual"
    return ""

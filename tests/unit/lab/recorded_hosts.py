"""Recorded answers of hosts, for the doctor: kernel logs and values as published by users of TDX hosts.

Each function returns a record as `gather` writes it. The wordings of the kernel logs are from public bug
reports and guides of the releases named; MSR values follow from the key split in the same log.
"""

import copy
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]

_FLAGS = "fpu vme msr pae vmx ss ht syscall nx lm xsave avx2 movdir64b tme sgx tdx_host_platform"
_CONFIG = {
    "CONFIG_CGROUP_MISC": "y",
    "CONFIG_HIBERNATION": "y",
    "CONFIG_INTEL_TDX_HOST": "y",
    "CONFIG_KVM": "m",
    "CONFIG_KVM_INTEL": "m",
    "CONFIG_KVM_INTEL_TDX": "y",
    "CONFIG_X86_MSR": "m",
}

_READY: Record = {
    "format": 1,
    "release": "6.19.0-3-generic",
    "machine": "x86_64",
    "python": [3, 12, 3],
    "uid": 0,
    "groups": [0],
    "cpu": {
        "vendor_id": "GenuineIntel",
        "model_name": "INTEL(R) XEON(R) PLATINUM 8570",
        "family": "6",
        "model": "207",
        "stepping": "2",
        "microcode": "0x21000283",
        "flags": _FLAGS.split(),
    },
    "packages": {"0": 0, "1": 56},
    "msrs": {
        "0x3a": {"0": {"value": 0x60005}, "1": {"value": 0x60005}},
        "0x87": {"0": {"value": 32 << 32 | 31}, "1": {"value": 32 << 32 | 31}},
        "0xa0": {"0": {"value": 0}, "1": {"value": 0}},
        "0xfe": {"0": {"value": 0xFD0A}, "1": {"value": 0xFD0A}},
        "0x981": {"0": {"value": 0x3F_0600_0000_0001}, "1": {"value": 0x3F_0600_0000_0001}},
        "0x982": {"0": {"value": 1 << 36 | 6 << 32 | 3}, "1": {"value": 1 << 36 | 6 << 32 | 3}},
        "0x1401": {"0": {"value": 0xFFFFC000C00}, "1": {"value": 0xFFFFC000C00}},
    },
    "kernel_log": {
        "source": "/dev/kmsg",
        "complete": True,
        "lines": [
            "Linux version 6.19.0-3-generic",
            "Command line: BOOT_IMAGE=/boot/vmlinuz-6.19.0-3-generic ro nohibernate kvm_intel.tdx=1",
            "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
            "virt/tdx: Disable ACPI S3. Turn off TDX in the BIOS to use ACPI S3.",
            "virt/tdx: Module version: 1.5.24",
            "virt/tdx: 1050644 KB allocated for PAMT",
            "virt/tdx: module initialized",
        ],
    },
    "kvm": {
        "stat": {"mode": 0o660, "uid": 0, "gid": 104},
        "api_version": 12,
        "extensions": {
            "KVM_CAP_NR_VCPUS": 112,
            "KVM_CAP_MAX_VCPUS": 4096,
            "KVM_CAP_USER_MEMORY2": 1,
            "KVM_CAP_MEMORY_ATTRIBUTES": 8,
            "KVM_CAP_GUEST_MEMFD": 1,
            "KVM_CAP_VM_TYPES": 0x23,
            "KVM_CAP_PRE_FAULT_MEMORY": 1,
        },
    },
    "kernels": {
        "6.19.0-3-generic": {"source": "/boot/config-6.19.0-3-generic", "options": _CONFIG},
        "6.8.0-101-generic": {
            "source": "/boot/config-6.8.0-101-generic",
            "options": _CONFIG | {"CONFIG_INTEL_TDX_HOST": None, "CONFIG_KVM_INTEL_TDX": None},
        },
    },
    "vms": {"holders": [], "unreadable": 0},
    "misc_cgroup": {"capacity": "sgx_epc 4261412864\ntdx 31\n", "current": "sgx_epc 0\ntdx 0\n"},
    "files": {
        "/proc/cmdline": {"text": "BOOT_IMAGE=/boot/vmlinuz-6.19.0-3-generic ro nohibernate kvm_intel.tdx=1\n"},
        "/proc/meminfo": {"text": "MemTotal:       263000000 kB\nMemAvailable:   250000000 kB\n"},
        "/proc/sys/kernel/tainted": {"text": "0\n"},
        "/sys/class/dmi/id/product_name": {"text": "D50DNP1SBB\n"},
        "/sys/devices/faux/tdx_host/version": {"error": "ENOENT"},
        "/sys/devices/system/cpu/online": {"text": "0-111\n"},
        "/sys/devices/system/cpu/present": {"text": "0-111\n"},
        "/sys/module/kvm_intel/parameters/ept": {"text": "Y\n"},
        "/sys/module/kvm_intel/parameters/tdx": {"text": "Y\n"},
        "/sys/power/state": {"text": "freeze\n"},
    },
}


# Emerald Rapids, Ubuntu 26.04, everything right.
def ready() -> Record:
    return copy.deepcopy(_READY)


def _log(record: Record, *lines: str) -> None:
    record["kernel_log"]["lines"] = list(lines)


def _no_tdx(record: Record) -> None:
    record["kvm"]["extensions"]["KVM_CAP_VM_TYPES"] = 0x3
    record["misc_cgroup"] = {"capacity": "sgx_epc 4261412864\n", "current": "sgx_epc 0\n"}
    record["files"]["/sys/module/kvm_intel/parameters/tdx"] = {"text": "N\n"}


def _unreadable_msrs(record: Record, error: str) -> None:
    record["msrs"] = {msr: {"0": {"error": error}, "1": {"error": error}} for msr in record["msrs"]}


def _set_msr(record: Record, msr: str, value: int, package: str | None = None) -> None:
    for name in record["msrs"][msr]:
        if package in (None, name):
            record["msrs"][msr][name] = {"value": value}


# Sapphire Rapids with Intel's 6.8 tree: the dialect before the merge, VM type 2, no misc cgroup.
def ready_v17() -> Record:
    record = ready()
    record["release"] = "6.8.0-1028-intel"
    options = _CONFIG | {"CONFIG_KVM_INTEL_TDX": None}
    record["kernels"] = {"6.8.0-1028-intel": {"source": "/boot/config-6.8.0-1028-intel", "options": options}}
    record["kvm"]["extensions"]["KVM_CAP_VM_TYPES"] = 0x7
    record["misc_cgroup"] = {"capacity": None, "current": None}
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
        "virt/tdx: Disable ACPI S3. Turn off TDX in the BIOS to use ACPI S3.",
        "virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 5, "
        "build_date 20240725, build_num 784",
        "virt/tdx: CMR: [0x100000, 0x77800000)",
        "virt/tdx: 4202516 KB allocated for PAMT",
        "virt/tdx: module initialized",
    )
    return record


# Granite Rapids, Linux 7.3: new wording, Dynamic PAMT, the version in sysfs.
def ready_7_3() -> Record:
    record = ready()
    record["release"] = "7.3.0"
    record["kernels"] = {"7.3.0": {"source": "/proc/config.gz", "options": _CONFIG}}
    record["files"]["/sys/devices/faux/tdx_host/version"] = {"text": "2.0.08\n"}
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [64, 128)",
        "virt/tdx: Enable Dynamic PAMT",
        "virt/tdx: 10092 KB allocated for PAMT",
        "virt/tdx: TDX-Module initialized",
    )
    return record


# The same host, asked by a user of the group kvm: MSRs, kernel log and other processes are closed.
def ready_unprivileged() -> Record:
    record = ready()
    record["uid"], record["groups"] = 1000, [1000, 104]
    _unreadable_msrs(record, "EACCES")
    record["kernel_log"] = {"error": "EPERM"}
    record["vms"] = {"holders": [], "unreadable": 312}
    return record


# TME was never switched on; the kernel stays silent because there are no KeyIDs.
def bios_without_tme() -> Record:
    record = ready()
    _no_tdx(record)
    for msr in ("0x87", "0x982", "0x1401"):
        _set_msr(record, msr, 0)
    _set_msr(record, "0x982", 1)
    _log(record, "Linux version 6.19.0-3-generic", "kvm_intel: tdx: no TDX private KeyIDs available")
    return record


# TME is on, TME-MK is not.
def bios_without_multi_tenancy() -> Record:
    record = bios_without_tme()
    _set_msr(record, "0x982", 3)
    return record


# TME-MK is on, but every KeyID went to MKTME.
def bios_without_key_split() -> Record:
    record = bios_without_tme()
    _set_msr(record, "0x982", 6 << 32 | 3)
    _set_msr(record, "0x87", 63)
    return record


# Keys are there, the SEAM range is on, but no module was loaded.
def bios_without_seam_loader() -> Record:
    record = ready()
    _no_tdx(record)
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
        "virt/tdx: module not loaded",
    )
    return record


# One socket's BIOS setup was changed, the other's was not.
def sockets_differ() -> Record:
    record = bios_without_seam_loader()
    _set_msr(record, "0x87", 16 << 32 | 47, package="1")
    return record


# Memory was swapped between slots: MCHECK wants an SGX factory reset.
def mcheck_failed() -> Record:
    record = bios_without_seam_loader()
    _set_msr(record, "0xa0", 1861)
    _set_msr(record, "0x1401", 0x400)
    return record


# TDs run; quotes cannot be had.
def sgx_off() -> Record:
    record = ready()
    _set_msr(record, "0x3a", 0x5)
    return record


# The host worked on 6.17 and broke with a newer kernel: nohibernate is missing.
def hibernation_possible() -> Record:
    record = ready()
    _no_tdx(record)
    record["files"]["/proc/cmdline"] = {"text": "BOOT_IMAGE=/vmlinuz-7.0 ro kvm_intel.tdx=1\n"}
    record["files"]["/sys/power/state"] = {"text": "freeze mem disk\n"}
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
        "virt/tdx: initialization failed: Hibernation support is enabled",
        "kvm_intel: tdx: no TDX private KeyIDs available",
    )
    return record


# Everything is right, and nobody asked kvm_intel for TDX.
def parameter_missing() -> Record:
    record = ready()
    _no_tdx(record)
    record["files"]["/proc/cmdline"] = {"text": "BOOT_IMAGE=/vmlinuz ro nohibernate\n"}
    _log(record, "virt/tdx: BIOS enabled: private KeyID range [32, 64)")
    return record


# A module of the 1.0 family: the first SEAMCALL of a newer kernel fails (canonical/tdx issues 83, 331).
def old_module() -> Record:
    record = ready()
    _no_tdx(record)
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
        "virt/tdx: SEAMCALL (0x22) failed: 0xc000050500000000",
        "virt/tdx: module initialization failed (-5)",
    )
    return record


# An early 1.5 module without NO_RBP_MOD.
def rbp_clobber() -> Record:
    record = old_module()
    _log(
        record,
        "virt/tdx: BIOS enabled: private KeyID range [32, 64)",
        "virt/tdx: Module version: 1.5.05",
        "virt/tdx: frame pointer (RBP) clobber bug present, upgrade TDX module",
        "virt/tdx: module initialization failed (-22)",
    )
    return record


# After a reboot the host came up with the distribution's other kernel (canonical/tdx issue 424).
def wrong_kernel_booted() -> Record:
    record = ready()
    _no_tdx(record)
    record["release"] = "6.8.0-101-generic"
    record["files"]["/sys/module/kvm_intel/parameters/tdx"] = {"error": "ENOENT"}
    _log(record, "Linux version 6.8.0-101-generic")
    return record


# Debian's own kernels are built without TDX.
def debian_kernel() -> Record:
    record = wrong_kernel_booted()
    record["release"] = "7.3.4~bpo13-amd64"
    options = _CONFIG | {"CONFIG_INTEL_TDX_HOST": "n", "CONFIG_KVM_INTEL_TDX": None}
    record["kernels"] = {record["release"]: {"source": "/usr/lib/modules/x/config", "options": options}}
    return record


# Nothing says no and nothing says yes: minimal image, unprivileged user, kernel without its configuration.
def no_configuration_no_log() -> Record:
    record = ready_unprivileged()
    record["kernels"] = {record["release"]: {"error": "ENOENT"}}
    record["kvm"] = {"stat": {"mode": 0o660, "uid": 0, "gid": 104}, "error": "EACCES"}
    return record


# kvm_intel failed to load, or nobody loaded it.
def kvm_not_loaded() -> Record:
    record = ready()
    record["kvm"] = {"error": "ENOENT"}
    for name in ("ept", "tdx"):
        record["files"][f"/sys/module/kvm_intel/parameters/{name}"] = {"error": "ENOENT"}
    _log(record, "virt/tdx: BIOS enabled: private KeyID range [32, 64)")
    return record


# A virtual machine on an Intel host.
def cloud_guest() -> Record:
    record = kvm_not_loaded()
    record["cpu"]["flags"] = [flag for flag in record["cpu"]["flags"] if flag != "tdx_host_platform"] + ["hypervisor"]
    record["files"]["/sys/class/dmi/id/product_name"] = {"text": "Google Compute Engine\n"}
    _unreadable_msrs(record, "EIO")
    return record


# EPYC with SEV-SNP: KVM_CAP_VM_TYPES has bit 2, which is SEV here and was TDX in the v17 dialect.
def amd_with_sev() -> Record:
    record = ready()
    record["cpu"] |= {"vendor_id": "AuthenticAMD", "model_name": "AMD EPYC 9654"}
    record["kvm"]["extensions"]["KVM_CAP_VM_TYPES"] = 0x1F
    record["misc_cgroup"] = {"capacity": "sev 410\nsev_es 99\n", "current": "sev 0\nsev_es 0\n"}
    for name in ("ept", "tdx"):
        record["files"][f"/sys/module/kvm_intel/parameters/{name}"] = {"error": "ENOENT"}
    _log(record, "Linux version 6.19.0-3-generic")
    _unreadable_msrs(record, "EIO")
    return record


# Not x86 at all.
def arm_server() -> Record:
    record = amd_with_sev()
    record["machine"] = "aarch64"
    record["cpu"] = dict.fromkeys(record["cpu"], "") | {"flags": []}
    return record


# Thirty-one TDs run.
def hkids_exhausted() -> Record:
    record = ready()
    record["misc_cgroup"]["current"] = "sgx_epc 0\ntdx 31\n"
    record["vms"]["holders"] = [{"pid": 4000 + i, "comm": "qemu-system-x86", "vms": 1} for i in range(31)]
    return record


# A TD's HKID was never given back, and nobody holds a VM.
def hkids_leaked() -> Record:
    record = ready()
    record["misc_cgroup"]["current"] = "sgx_epc 0\ntdx 2\n"
    return record


# A long-term-support distribution's Python.
def old_python() -> Record:
    record = ready()
    record["python"] = [3, 9, 21]
    return record


# The boot's first lines have left the ring buffer, and there is no journal; KVM still answers.
def log_rotated() -> Record:
    record = ready()
    record["kernel_log"] = {"source": "/dev/kmsg", "complete": False, "lines": []}
    return record


# `__tdx_reclaim_page` warned two weeks into a soak (canonical/tdx issue 149).
def after_a_warning() -> Record:
    record = ready()
    record["files"]["/proc/sys/kernel/tainted"] = {"text": "512\n"}
    return record


# Another tenant took the memory.
def little_memory() -> Record:
    record = ready()
    record["files"]["/proc/meminfo"] = {"text": "MemTotal:       263000000 kB\nMemAvailable:      400000 kB\n"}
    return record


# kvm_intel was loaded too early, failed, and was loaded again: the last attempt counts.
def module_reloaded() -> Record:
    record = ready()
    record["kernel_log"]["lines"].insert(2, "kvm_intel: tdx: tdx requires kvm.enable_virt_at_load=1")
    return record


HOSTS: dict[str, Callable[[], Record]] = {
    host.__name__: host
    for host in (
        ready, ready_v17, ready_7_3, ready_unprivileged, bios_without_tme, bios_without_multi_tenancy,
        bios_without_key_split, bios_without_seam_loader, sockets_differ, mcheck_failed, sgx_off,
        hibernation_possible, parameter_missing, old_module, rbp_clobber, wrong_kernel_booted, debian_kernel,
        no_configuration_no_log, kvm_not_loaded, cloud_guest, amd_with_sev, arm_server, hkids_exhausted,
        hkids_leaked, old_python, log_rotated, after_a_warning, little_memory, module_reloaded,
    )
}  # fmt: skip

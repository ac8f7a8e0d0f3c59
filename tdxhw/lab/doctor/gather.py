"""Record what a host says about itself, as one JSON document on stdout. Judges nothing, changes nothing.

This file is also sent to a lab host as it is (``ssh HOST python3 - < gather.py``): standard library only, no
import from tdxhw, and nothing newer than Python 3.7, because "Python is too old" has to be an answer, not a
traceback.
"""
# ruff: noqa: PTH112, PTH115, PTH116, PTH123, PTH207, PTH208

from __future__ import annotations

import errno
import fcntl
import glob
import gzip
import json
import os
import platform
import re
import subprocess
import sys
from typing import Any

FORMAT = 1

FILES = (
    "/proc/cmdline",
    "/proc/meminfo",
    "/proc/sys/kernel/dmesg_restrict",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sys/kernel/tainted",
    "/sys/class/dmi/id/bios_version",
    "/sys/class/dmi/id/product_name",
    "/sys/class/dmi/id/sys_vendor",
    "/sys/devices/faux/tdx_host/seamldr_version",
    "/sys/devices/faux/tdx_host/version",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/present",
    "/sys/kernel/security/lockdown",
    "/sys/module/kvm/parameters/enable_virt_at_load",
    "/sys/module/kvm_intel/initstate",
    "/sys/module/kvm_intel/parameters/ept",
    "/sys/module/kvm_intel/parameters/tdx",
    "/sys/power/state",
)

# The misc cgroup counts HKIDs since Linux 6.16: cgroup v2, v1 with v2 beside it, v1 alone.
CGROUP_FOLDERS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/misc")

# arch/x86/include/asm/msr-index.h and the TDX architecture specification name them.
MSRS = (
    0x3A,  # IA32_FEATURE_CONTROL
    0x87,  # IA32_MKTME_KEYID_PARTITIONING
    0xA0,  # the MCHECK status of SGX
    0xFE,  # IA32_MTRRCAP
    0x981,  # IA32_TME_CAPABILITY
    0x982,  # IA32_TME_ACTIVATE
    0x1401,  # IA32_SEAMRR_PHYS_MASK
)

KVM_GET_API_VERSION = 0xAE00
KVM_CHECK_EXTENSION = 0xAE03
KVM_EXTENSIONS = {
    "KVM_CAP_NR_VCPUS": 9,
    "KVM_CAP_MAX_VCPUS": 66,
    "KVM_CAP_USER_MEMORY2": 231,
    "KVM_CAP_MEMORY_ATTRIBUTES": 233,
    "KVM_CAP_GUEST_MEMFD": 234,
    "KVM_CAP_VM_TYPES": 235,
    "KVM_CAP_PRE_FAULT_MEMORY": 236,
}

CONFIG_OPTIONS = (
    "CONFIG_CGROUP_MISC",
    "CONFIG_HIBERNATION",
    "CONFIG_INTEL_TDX_HOST",
    "CONFIG_KVM",
    "CONFIG_KVM_INTEL",
    "CONFIG_KVM_INTEL_TDX",
    "CONFIG_X86_MSR",
)

KERNEL_LOG_LINE = re.compile(r"tdx|seam|\btme\b|mktme|kvm|Linux version|Command line", re.IGNORECASE)


def error_name(error: OSError) -> str:
    """Return ``ENOENT`` for the error."""
    return errno.errorcode.get(error.errno or 0, str(error))


def read(path: str, limit: int = 65536) -> dict[str, str]:
    """Return ``{"text": …}`` or ``{"error": errno name}``."""
    try:
        with open(path, "rb") as file:
            return {"text": file.read(limit).decode("utf-8", "replace")}
    except OSError as error:
        return {"error": error_name(error)}


def first_cpu_of_each_package() -> dict[str, int]:
    """Return the lowest online CPU by physical package id."""
    packages: dict[str, int] = {}
    for path in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/topology/physical_package_id"):
        cpu = int(path.split("/")[5][3:])
        package = read(path).get("text", "").strip()
        if package:
            packages[package] = min(cpu, packages.get(package, cpu))
    return packages


def read_msrs(packages: dict[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Read each MSR on one CPU of each package: BIOS setup can differ between sockets."""
    readings: dict[str, dict[str, dict[str, Any]]] = {}
    for package, cpu in sorted(packages.items()):
        for msr in MSRS:
            try:
                fd = os.open("/dev/cpu/%d/msr" % cpu, os.O_RDONLY)  # noqa: UP031
                try:
                    reading: dict[str, Any] = {"value": int.from_bytes(os.pread(fd, 8, msr), "little")}
                finally:
                    os.close(fd)
            except OSError as error:
                reading = {"error": error_name(error)}
            readings.setdefault(hex(msr), {})[package] = reading
    return readings


def read_cpu() -> dict[str, Any]:
    """Return the fields of the first CPU in /proc/cpuinfo."""
    first = read("/proc/cpuinfo").get("text", "").split("\n\n")[0]
    fields = dict(re.findall(r"^([^\t:]+)\t*: ?(.*)$", first, re.MULTILINE))
    return {
        "vendor_id": fields.get("vendor_id", ""),
        "model_name": fields.get("model name", ""),
        "family": fields.get("cpu family", ""),
        "model": fields.get("model", ""),
        "stepping": fields.get("stepping", ""),
        "microcode": fields.get("microcode", ""),
        "flags": fields.get("flags", "").split(),
    }


def read_kernel_log() -> dict[str, Any]:
    """Return the lines of this boot about TDX and KVM, and whether the log still has its beginning."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return read_journal(error_name(error))
    records: list[str] = []
    try:
        while True:
            try:
                records.append(os.read(fd, 16384).decode("utf-8", "replace"))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:  # EPIPE: a record was overwritten while we read; go on with the next
                    return read_journal(error_name(error))
    finally:
        os.close(fd)
    complete = bool(records) and records[0].split(",")[1] == "0"
    if not complete:
        journal = read_journal("")
        if journal.get("complete"):
            return journal
    messages = [record.partition(";")[2].split("\n")[0] for record in records]
    lines = [message for message in messages if KERNEL_LOG_LINE.search(message)]
    return {"source": "/dev/kmsg", "complete": complete, "lines": lines}


def read_journal(why: str) -> dict[str, Any]:
    """Return the same from the journal, which outlives the ring buffer; `why` is the error that led here."""
    command = ["journalctl", "--dmesg", "--boot", "--no-pager", "--quiet", "--output=cat"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {"error": why or "ENOENT"}
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode != 0 or not lines:
        return {"error": why or "ENOENT"}
    complete = lines[0].startswith("Linux version")
    return {
        "source": "journalctl",
        "complete": complete,
        "lines": [line for line in lines if KERNEL_LOG_LINE.search(line)],
    }


def read_kvm() -> dict[str, Any]:
    """Return who may open /dev/kvm, and what it answers if we may."""
    answer: dict[str, Any] = {}
    try:
        status = os.stat("/dev/kvm")
        answer["stat"] = {"mode": status.st_mode & 0o7777, "uid": status.st_uid, "gid": status.st_gid}
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        answer["error"] = error_name(error)
        return answer
    try:
        answer["api_version"] = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
        answer["extensions"] = {
            name: fcntl.ioctl(fd, KVM_CHECK_EXTENSION, number) for name, number in KVM_EXTENSIONS.items()
        }
    except OSError as error:
        answer["error"] = error_name(error)
    finally:
        os.close(fd)
    return answer


def read_config(release: str) -> dict[str, Any]:
    """Return the options that matter, of an installed kernel, from wherever its configuration is."""
    places = [
        "/boot/config-" + release,
        "/usr/lib/modules/" + release + "/config",
        "/lib/modules/" + release + "/config",
    ]
    if release == platform.release():
        places.insert(0, "/proc/config.gz")
    for path in places:
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                text = file.read().decode("utf-8", "replace")
        except OSError:
            continue
        options = {}
        for name in CONFIG_OPTIONS:
            match = re.search("^(?:%s=(.*)|# %s is not set)$" % (name, name), text, re.MULTILINE)  # noqa: UP031
            options[name] = None if match is None else (match.group(1) or "n")
        return {"source": path, "options": options}
    return {"error": "ENOENT"}


def installed_kernels() -> list[str]:
    """Return the releases for which there are modules or a boot image."""
    found = {platform.release()}
    for folder in ("/usr/lib/modules", "/lib/modules"):
        if os.path.isdir(folder):
            found.update(os.listdir(folder))
    found.update(path[len("/boot/vmlinuz-") :] for path in glob.glob("/boot/vmlinuz-*"))
    return sorted(found)


def open_vms(pid: str) -> int:
    """Return how many VMs the process holds. Raise ``OSError`` if it may not be looked into."""
    folder = "/proc/" + pid + "/fd/"
    vms = 0
    for fd in os.listdir(folder):
        try:
            vms += os.readlink(folder + fd).startswith("anon_inode:kvm-vm")
        except FileNotFoundError:  # closed since
            continue
    return vms


def vm_holders() -> dict[str, Any]:
    """Return the processes that hold a VM, and how many could not be looked into."""
    holders: list[dict[str, Any]] = []
    unreadable = 0
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or int(pid) == os.getpid():
            continue
        try:
            vms = open_vms(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            unreadable += 1
            continue
        if vms:
            name = read("/proc/" + pid + "/comm").get("text", "").strip()
            holders.append({"pid": int(pid), "comm": name, "vms": vms})
    return {"holders": holders, "unreadable": unreadable}


def misc_cgroup() -> dict[str, str | None]:
    """Return the capacity and use of the misc cgroup's root, ``None`` where there is none."""
    for folder in CGROUP_FOLDERS:
        capacity = read(folder + "/misc.capacity")
        if "text" in capacity:
            return {"capacity": capacity["text"], "current": read(folder + "/misc.current").get("text")}
    return {"capacity": None, "current": None}


def gather() -> dict[str, Any]:
    """Return everything the checks look at."""
    packages = first_cpu_of_each_package()
    return {
        "format": FORMAT,
        "release": platform.release(),
        "machine": platform.machine(),
        "python": list(sys.version_info[:3]),
        "uid": os.geteuid(),
        "groups": sorted(set(os.getgroups()) | {os.getegid()}),
        "cpu": read_cpu(),
        "packages": packages,
        "msrs": read_msrs(packages),
        "kernel_log": read_kernel_log(),
        "kvm": read_kvm(),
        "kernels": {release: read_config(release) for release in installed_kernels()},
        "vms": vm_holders(),
        "misc_cgroup": misc_cgroup(),
        "files": {path: read(path) for path in FILES},
    }


if __name__ == "__main__":
    json.dump(gather(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")

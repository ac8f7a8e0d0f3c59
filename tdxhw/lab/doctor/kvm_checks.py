"""Checks of KVM and of what is left on the host for us. What /dev/kvm answers is what decides."""

import grp
from typing import Final

from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Finding, failed, passed, unknown, warned
from tdxhw.lab.doctor.kernel_log import keyid_range
from tdxhw.lab.hosts import Expectation

KVM_API_VERSION: Final = 12
_NEEDED: Final = ("KVM_CAP_USER_MEMORY2", "KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_GUEST_MEMFD")
_LITTLE_MEMORY_KIB: Final = 4 << 20
_TOO_LITTLE_MEMORY_KIB: Final = 512 << 10


def kvm_device(facts: Facts, _: Expectation) -> Finding:
    """Check that /dev/kvm is there and that this user may open it."""
    kvm = facts.kvm
    if kvm.error is None:
        if kvm.api_version != KVM_API_VERSION:
            return failed(f"KVM API version {kvm.api_version}", f"version {KVM_API_VERSION} is the only one there is")
        return passed("opened, API version 12")
    if kvm.error == "ENOENT":
        return failed("no /dev/kvm", "load KVM: sudo modprobe kvm_intel; enable VT-x in BIOS setup")
    if kvm.error in ("EACCES", "EPERM"):
        owner = "its group" if kvm.gid is None else f"group {_group(kvm.gid)}"
        mode = "" if kvm.mode is None else f" (mode {kvm.mode:04o}, {owner})"
        return failed(
            f"no permission to open /dev/kvm{mode}",
            'sudo usermod -aG kvm "$USER" and log in again; a udev rule keeps the group: '
            'KERNEL=="kvm", GROUP="kvm", MODE="0660"',
        )
    return failed(f"/dev/kvm: {kvm.error}", "`dmesg` says why; ENODEV and EBUSY mean that another hypervisor has VMX")


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def tdx_vm_type(facts: Facts, _: Expectation) -> Finding:
    """Check that KVM offers VMs of type TDX, which proves that everything underneath works."""
    if facts.kvm.error is not None:
        return unknown("/dev/kvm could not be asked", "see the check '/dev/kvm'")
    dialect = facts.kvm_tdx_dialect
    types = facts.kvm.extensions.get("KVM_CAP_VM_TYPES", 0)
    if dialect is None:
        return failed(f"KVM offers no TDX VM (KVM_CAP_VM_TYPES = {types:#x})", "the failed checks above say why")
    return passed(f"TDX, dialect {dialect} (KVM_CAP_VM_TYPES = {types:#x})")


def kvm_capabilities(facts: Facts, _: Expectation) -> Finding:
    """Check that KVM has the memory interfaces that a TD needs."""
    if facts.kvm.error is not None:
        return unknown("/dev/kvm could not be asked", "see the check '/dev/kvm'")
    missing = [name for name in _NEEDED if not facts.kvm.extensions.get(name)]
    if missing:
        return failed(
            f"missing: {', '.join(missing)}", "boot a kernel whose KVM has guest_memfd (CONFIG_KVM_INTEL_TDX)"
        )
    return passed(", ".join(name.removeprefix("KVM_CAP_").lower() for name in _NEEDED))


def free_hkids(facts: Facts, _: Expectation) -> Finding:
    """Check that KeyIDs are left for our TDs."""
    capacity, used = facts.tdx_keyids(facts.cgroup_capacity), facts.tdx_keyids(facts.cgroup_current)
    if capacity is None:
        reported = keyid_range(facts.kernel_log.lines)
        of = f" of {reported[1] - reported[0] - 1}" if reported else ""
        return unknown(f"cannot see how many HKIDs{of} are free", "Linux 6.16 with CONFIG_CGROUP_MISC tells")
    if used is None:
        return unknown(f"{capacity} HKIDs, cannot see how many are in use", "mount the misc cgroup's root")
    free = capacity - used
    if free < 1:
        return failed(
            f"all {capacity} HKIDs are in use",
            "end the TDs that run; an HKID without a process needs a reboot",
        )
    if free < 2:
        return warned(f"1 of {capacity} HKIDs is free", "suites with two TDs will fail; end the TDs that run")
    return passed(f"{free} of {capacity} HKIDs are free")


def leftover_tds(facts: Facts, _: Expectation) -> Finding:
    """Check that nobody else runs VMs, and that no HKID is held by nobody."""
    used = facts.tdx_keyids(facts.cgroup_current)
    names = ", ".join(f"{holder.comm}[{holder.pid}]" for holder in facts.holders)
    if used and not facts.holders and not facts.unreadable_processes:
        return warned(f"{used} HKIDs are held, but no process has a VM: leaked", "reboot to get them back")
    if facts.holders:
        total = sum(holder.vms for holder in facts.holders)
        return warned(f"{total} VMs are open in {names}", "wait for them, or stop them, before measuring anything")
    if facts.unreadable_processes and facts.uid != 0:
        return unknown(f"{facts.unreadable_processes} processes could not be looked into", "run as root")
    return passed("no VM is open")


def memory(facts: Facts, _: Expectation) -> Finding:
    """Check that there is memory for TDs, which cannot be swapped."""
    fields = dict(line.split(":", 1) for line in (facts.text("/proc/meminfo") or "").splitlines() if ":" in line)
    try:
        available_kib = int(fields["MemAvailable"].split()[0])
    except (KeyError, ValueError, IndexError):
        return unknown("/proc/meminfo does not say", "is /proc mounted?")
    detail = f"{available_kib / (1 << 20):.1f} GiB available"
    if available_kib < _TOO_LITTLE_MEMORY_KIB:
        return failed(detail, "free memory: a TD's private memory cannot be swapped")
    if available_kib < _LITTLE_MEMORY_KIB:
        return warned(detail, "suites with several TDs want 4 GiB")
    return passed(detail)


def cpus_online(facts: Facts, _: Expectation) -> Finding:
    """Check that every CPU is online: each package needs one to set up a TD's key."""
    online, present = (facts.text(f"/sys/devices/system/cpu/{name}") for name in ("online", "present"))
    if online is None or present is None:
        return unknown("/sys/devices/system/cpu cannot be read", "is /sys mounted?")
    if online != present:
        return warned(f"CPUs {online} of {present} are online", "a package without an online CPU cannot set up a TD")
    return passed(f"CPUs {online}, {max(len(facts.packages), 1)} package(s)")

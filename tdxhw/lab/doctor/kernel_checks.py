"""Checks of the kernel: which one booted, how it was built, how it was started, and what it made of TDX."""

import re
from fnmatch import fnmatchcase
from typing import Final

from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Finding, failed, passed, unknown, warned
from tdxhw.lab.doctor.kernel_log import module_version, outcome
from tdxhw.lab.hosts import Expectation
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import describe

_READ_LOG: Final = "run as root, or set kernel.dmesg_restrict=0"
_TAINTS: Final = {9: "W (a warning was hit)", 7: "D (it oopsed)", 4: "M (machine check)", 5: "B (bad page)"}


def _can_host(config: dict[str, str | None] | None) -> bool:
    return config is not None and config.get("CONFIG_INTEL_TDX_HOST") == "y"


def booted_kernel(facts: Facts, expects: Expectation) -> Finding:
    """Check that the intended kernel is running: a host that fell back to another looks fine."""
    if expects.kernel is not None and not fnmatchcase(facts.release, expects.kernel):
        return failed(
            f"{facts.release} is running, the lab file expects {expects.kernel}",
            "boot the expected kernel once (grub-reboot ENTRY && reboot), check it, then make it the default",
        )
    running = facts.kernels.get(facts.release)
    better = [release for release, config in facts.kernels.items() if _can_host(dict(config) if config else None)]
    if running is not None and facts.release not in better and better:
        return failed(
            f"{facts.release} is running and cannot host TDX; installed and able to: {', '.join(better)}",
            f"boot {better[-1]}: grub-reboot its entry and reboot",
        )
    return passed(f"{facts.release}{' as expected' if expects.kernel else ''}")


def kernel_configuration(facts: Facts, _: Expectation) -> Finding:
    """Check that the kernel was built to host TDX."""
    config = facts.kernels.get(facts.release)
    if config is None:
        return unknown(
            f"no configuration of {facts.release} in /proc/config.gz, /boot or /lib/modules",
            "install the configuration that comes with the kernel, or build with CONFIG_IKCONFIG_PROC",
        )
    if config.get("CONFIG_INTEL_TDX_HOST") != "y":
        return failed("CONFIG_INTEL_TDX_HOST is not set", "boot a kernel built with CONFIG_INTEL_TDX_HOST=y")
    if config.get("CONFIG_KVM_INTEL") not in ("y", "m"):
        return failed("CONFIG_KVM_INTEL is not set", "boot a kernel built with CONFIG_KVM_INTEL=m")
    # Kernels before the merge of the series have no such option: absent is fine, switched off is not.
    if config.get("CONFIG_KVM_INTEL_TDX") == "n":
        return failed("CONFIG_KVM_INTEL_TDX is not set", "boot a kernel built with CONFIG_KVM_INTEL_TDX=y")
    if config.get("CONFIG_X86_MSR") not in ("y", "m"):
        return warned("can host TDX, but CONFIG_X86_MSR is not set", "with it the doctor sees what the BIOS set up")
    return passed("CONFIG_INTEL_TDX_HOST=y")


def hibernation(facts: Facts, _: Expectation) -> Finding:
    """Check that hibernation is impossible: where it is possible the kernel refuses TDX."""
    if "nohibernate" in facts.command_line:
        return passed("nohibernate is on the command line")
    state = facts.text("/sys/power/state")
    if state is not None and "disk" not in state.split():
        return passed("this kernel cannot hibernate")
    if facts.kvm_tdx_dialect:
        return passed("this kernel does TDX in spite of hibernation")
    if state is None:
        return unknown("/sys/power/state cannot be read", "put nohibernate on the kernel command line to be sure")
    return failed("hibernation is possible", "add nohibernate to the kernel command line and reboot")


def kvm_intel_parameter(facts: Facts, _: Expectation) -> Finding:
    """Check that kvm_intel has TDX on; it switches it off itself when TDX cannot be had."""
    value = facts.text("/sys/module/kvm_intel/parameters/tdx")
    asked = [word for word in facts.command_line if re.fullmatch(r"kvm[-_]intel\.tdx=(?:1|y|Y|on)", word)]
    if value is None:
        if facts.text("/sys/module/kvm_intel/parameters/ept") is None:
            return failed("kvm_intel is not loaded", "sudo modprobe kvm_intel tdx=1; `dmesg` says why if it fails")
        return failed("this kvm_intel has no parameter 'tdx'", "boot a kernel built with CONFIG_KVM_INTEL_TDX=y")
    if value in ("Y", "1"):
        return passed("kvm_intel.tdx=Y")
    if asked:
        return failed(f"{asked[0]} was asked for, but kvm_intel switched it off", "see the check 'TDX set up'")
    return failed(
        "kvm_intel.tdx=N",
        "add kvm_intel.tdx=1 to the kernel command line, or `options kvm_intel tdx=1` to /etc/modprobe.d",
    )


def tdx_set_up(facts: Facts, _: Expectation) -> Finding:
    """Say in words how setting TDX up ended."""
    log = facts.kernel_log
    if log.error is not None:
        return unknown(f"the kernel log cannot be read ({log.error})", _READ_LOG)
    ended = outcome(log.lines)
    if ended is None:
        if facts.text("/sys/devices/faux/tdx_host/version"):
            return passed("the kernel has a TDX module in use")
        if log.complete:
            return failed(
                "the kernel never tried: no line about TDX in its log",
                "is this the right kernel, with TDX on in the BIOS and kvm_intel loaded?",
            )
        return unknown("the beginning of the kernel log is gone", "reboot, or enlarge it with log_buf_len=8M")
    if ended.reason is None:
        return passed(ended.line)
    detail = f"{ended.reason.meaning}: {ended.line!r}"
    if ended.seamcall:
        leaf, status = ended.seamcall
        name = next((known.name for known in SeamcallLeaf if known == leaf), f"leaf {leaf:#x}")
        detail += f"; {name} answered {describe(status)}"
    return failed(detail, ended.reason.remedy)


def tdx_module(facts: Facts, expects: Expectation) -> Finding:
    """Say which TDX module is loaded: results depend on it, and a BIOS update changes it silently."""
    reported = facts.text("/sys/devices/faux/tdx_host/version")
    found = module_version((f"tdx: module version: {reported}",) if reported else facts.kernel_log.lines)
    if found is None:
        if facts.kernel_log.error is not None:
            return unknown("no version in sysfs, and the kernel log cannot be read", _READ_LOG)
        return unknown("the kernel does not say which module is loaded", "kernels from 7.0 on say it in sysfs")
    if expects.module is None:
        return passed(f"TDX module {found}")
    older = found.is_older_than(expects.module)
    if older is None:
        return unknown(f"TDX module {found}: too coarse to compare with {expects.module}", "boot a newer kernel")
    if older:
        return failed(
            f"TDX module {found}, the lab file expects {expects.module} or newer",
            "update the module: with the BIOS, or on the EFI system partition (EFI/TDX)",
        )
    return passed(f"TDX module {found}, at least {expects.module}")


def taint(facts: Facts, _: Expectation) -> Finding:
    """Check that nothing has hurt the kernel before we begin."""
    text = facts.text("/proc/sys/kernel/tainted")
    if text is None or not text.isdigit():
        return unknown("/proc/sys/kernel/tainted cannot be read", "is /proc mounted?")
    bad = [meaning for bit, meaning in _TAINTS.items() if int(text) >> bit & 1]
    if bad:
        return warned(f"tainted: {', '.join(bad)}", "read the kernel log, then reboot before trusting results")
    return passed("not tainted by an earlier fault")

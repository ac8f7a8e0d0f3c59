"""Checks of the CPU and of what the BIOS set up. MSR numbers and bits: the TDX architecture specification."""

from collections.abc import Mapping
from typing import Final

from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Finding, failed, passed, unknown, warned
from tdxhw.lab.doctor.kernel_log import keyid_range
from tdxhw.lab.hosts import Expectation

MINIMUM_PYTHON: Final = (3, 11)

_LET_US_READ: Final = "run as root with the msr module loaded: sudo modprobe msr && sudo tdxhw doctor"
_HYPERVISOR_REMEDY: Final = "use the machine itself; here only the simulator runs TDs (tdxhw run --on sim)"


def python(facts: Facts, _: Expectation) -> Finding:
    """Check that Python is new enough for tdxhw."""
    version = ".".join(str(part) for part in facts.python)
    if facts.python < MINIMUM_PYTHON:
        return failed(f"Python {version}", "install Python 3.11 or newer; tdxhw needs nothing else on a host")
    return passed(f"Python {version}")


def cpu(facts: Facts, _: Expectation) -> Finding:
    """Check that this CPU can have TDX."""
    name = facts.cpu.model_name or "unnamed CPU"
    if facts.machine != "x86_64":
        return failed(f"{facts.machine}", "TDX exists on x86-64 only; elsewhere run on the simulator: --on sim")
    if not facts.is_intel:
        remedy = "TDX needs an Intel Xeon of the 4th generation or newer; here run on the simulator: --on sim"
        return failed(f"{name} ({facts.cpu.vendor_id or 'vendor unknown'})", remedy)
    return passed(f"{name}, microcode {facts.cpu.microcode or 'unknown'}")


def bare_metal(facts: Facts, _: Expectation) -> Finding:
    """Check that this is no virtual machine: SEAM cannot be nested."""
    if "hypervisor" not in facts.cpu.flags:
        return passed("no hypervisor underneath")
    if facts.kvm_tdx_dialect:
        return warned("a hypervisor is underneath, and yet KVM offers TDX", "results are not those of hardware")
    product = facts.text("/sys/class/dmi/id/product_name")
    return failed(f"this is a virtual machine{f' ({product})' if product else ''}", _HYPERVISOR_REMEDY)


def cpu_features(facts: Facts, _: Expectation) -> Finding:
    """Check the features that the kernel wants before it touches TDX."""
    wanted = {"vmx": "VMX", "xsave": "XSAVE", "movdir64b": "MOVDIR64B", "ss": "self-snoop"}
    missing = [name for flag, name in wanted.items() if flag not in facts.cpu.flags]
    if missing:
        return failed(
            f"missing: {', '.join(missing)}",
            "enable VT-x in BIOS setup; remove clearcpuid= from the kernel command line",
        )
    return passed(", ".join(wanted.values()))


def _differs(values: Mapping[str, int]) -> str:
    return ", ".join(f"package {package}: {value:#x}" for package, value in values.items())


def _unreadable(msr: int, error: str) -> Finding:
    return unknown(f"MSR {msr:#x} cannot be read ({error})", _LET_US_READ)


def feature_control(facts: Facts, _: Expectation) -> Finding:
    """Check that IA32_FEATURE_CONTROL allows VMX (bit 2) or is not locked (bit 0)."""
    values = facts.msr(0x3A)
    if isinstance(values, str):
        return _unreadable(0x3A, values)
    if any(value & 1 and not value & 1 << 2 for value in values.values()):
        return failed(f"the BIOS locked VMX off ({_differs(values)})", "enable VT-x in BIOS setup")
    return passed("VMX allowed")


def tme(facts: Facts, _: Expectation) -> Finding:
    """Check that memory encryption is on (IA32_TME_ACTIVATE bit 1) and TDX has KeyID bits (39:36)."""
    values = facts.msr(0x982)
    if isinstance(values, str):
        return _unreadable(0x982, values)
    if any(not value & 1 << 1 for value in values.values()):
        return failed(f"TME is off ({_differs(values)})", "in BIOS setup, turn Memory Encryption (TME) on")
    if any(not value >> 32 & 0xF for value in values.values()):
        return failed("TME has no KeyIDs (TME-MK is off)", "in BIOS setup, turn TME Multi-Tenancy (TME-MT) on")
    if any(not value >> 36 & 0xF for value in values.values()):
        return failed("no KeyID bits are reserved for TDX", "in BIOS setup, set the TME-MT/TDX key split above 0")
    value = min(values.values())
    return passed(f"TME-MK on, {value >> 32 & 0xF} KeyID bits, {value >> 36 & 0xF} of them for TDX")


def private_keyids(facts: Facts, _: Expectation) -> Finding:
    """Check that TDX has a KeyID for itself and one for a TD (IA32_MKTME_KEYID_PARTITIONING)."""
    values = facts.msr(0x87)
    if isinstance(values, str):
        reported = keyid_range(facts.kernel_log.lines)
        if reported is None:
            return _unreadable(0x87, values)
        count, source = reported[1] - reported[0], "the kernel log"
    else:
        if len(set(values.values())) > 1:
            return failed(f"the packages differ ({_differs(values)})", "give every socket the same BIOS setup")
        count, source = next(iter(values.values())) >> 32, "MSR 0x87"
    if count < 2:
        remedy = "in BIOS setup, set the TME-MT/TDX key split above 0 (the TDX module needs one KeyID for itself)"
        return failed(f"{count} private KeyIDs by {source}", remedy)
    return passed(f"{count} private KeyIDs by {source}: {count - 1} TDs at the same time")


def seamrr(facts: Facts, _: Expectation) -> Finding:
    """Check that the SEAM range is there (IA32_MTRRCAP bit 15) and on (IA32_SEAMRR_PHYS_MASK bit 11)."""
    supported, mask = facts.msr(0xFE), facts.msr(0x1401)
    if isinstance(supported, str):
        return _unreadable(0xFE, supported)
    if any(not value & 1 << 15 for value in supported.values()):
        return failed("the CPU has no SEAM range (SEAMRR)", "this CPU or its microcode has no TDX: update the BIOS")
    if isinstance(mask, str):
        return _unreadable(0x1401, mask)
    if any(not value & 1 << 11 for value in mask.values()):
        return failed(f"the SEAM range is off ({_differs(mask)})", "in BIOS setup, turn TDX and the SEAM loader on")
    return passed("SEAMRR on")


def mcheck(facts: Facts, _: Expectation) -> Finding:
    """Check that MCHECK passed (MSR 0xa0 is 0): the SEAM loader refuses without."""
    values, control = facts.msr(0xA0), facts.msr(0x3A)
    if isinstance(values, str):
        return _unreadable(0xA0, values)
    if any(values.values()):
        return failed(
            f"MCHECK failed ({_differs(values)})",
            "in BIOS setup, do an SGX factory reset, then enable SGX again; check the DIMM population rules",
        )
    if not isinstance(control, str) and any(not value & 1 << 18 for value in control.values()):
        return warned("SGX is off: TDs run, but nothing can be attested", "enable SGX in BIOS setup for quotes")
    return passed("MCHECK passed")

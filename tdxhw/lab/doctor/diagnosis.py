"""The checks in their order, and the verdict over all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final

from tdxhw.lab.doctor import kernel_checks, kvm_checks, platform_checks
from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Finding, Status, unknown
from tdxhw.lab.hosts import Expectation


class Verdict(IntEnum):
    """The exit code of `tdxhw doctor`."""

    READY = 0
    NOT_READY = 1
    COULD_NOT_TELL = 2


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a host."""

    name: str
    title: str
    look: Callable[[Facts, Expectation], Finding]
    needs: tuple[str, ...] = ()  # if one of these failed, this question makes no sense
    proven_by: tuple[str, ...] = ()  # if one of these passed, not knowing this does not matter


_PROOF: Final = ("tdx-vm-type",)
_INTEL: Final = ("cpu",)
_FIRMWARE: Final = ("cpu", "bare-metal")

# Top to bottom: what has to be right first comes first, so that the first FAIL is the one to look at.
CHECKS: Final = (
    Check("python", "Python", platform_checks.python),
    Check("cpu", "CPU", platform_checks.cpu),
    Check("bare-metal", "Bare metal", platform_checks.bare_metal, _INTEL),
    Check("cpu-features", "CPU features", platform_checks.cpu_features, _INTEL, _PROOF),
    Check("feature-control", "VMX in the BIOS", platform_checks.feature_control, _FIRMWARE, _PROOF),
    Check("tme", "Memory encryption", platform_checks.tme, _FIRMWARE, _PROOF),
    Check("private-keyids", "Private KeyIDs", platform_checks.private_keyids, _FIRMWARE, _PROOF),
    Check("seamrr", "SEAM range", platform_checks.seamrr, _FIRMWARE, _PROOF),
    Check("mcheck", "MCHECK", platform_checks.mcheck, _FIRMWARE, _PROOF),
    Check("booted-kernel", "Kernel that booted", kernel_checks.booted_kernel),
    Check("kernel-config", "Kernel configuration", kernel_checks.kernel_configuration, _INTEL, _PROOF),
    Check("hibernation", "Hibernation", kernel_checks.hibernation, _FIRMWARE, _PROOF),
    Check("kvm-intel", "kvm_intel.tdx", kernel_checks.kvm_intel_parameter, _INTEL, _PROOF),
    Check("tdx-set-up", "TDX set up", kernel_checks.tdx_set_up, _FIRMWARE, _PROOF),
    Check("tdx-module", "TDX module", kernel_checks.tdx_module, (*_FIRMWARE, "tdx-set-up")),
    Check("taint", "Kernel taint", kernel_checks.taint),
    Check("dev-kvm", "/dev/kvm", kvm_checks.kvm_device),
    Check("tdx-vm-type", "TDX VM type", kvm_checks.tdx_vm_type, ("dev-kvm",)),
    Check("kvm-capabilities", "KVM capabilities", kvm_checks.kvm_capabilities, ("dev-kvm",)),
    Check("free-hkids", "Free HKIDs", kvm_checks.free_hkids, ("tdx-vm-type",)),
    Check("leftover-tds", "Open VMs", kvm_checks.leftover_tds),
    Check("memory", "Memory", kvm_checks.memory),
    Check("cpus-online", "CPUs online", kvm_checks.cpus_online),
)

# Good to know, but a host is no less ready for not telling.
_ADVICE: Final = frozenset({"tdx-module", "free-hkids", "leftover-tds", "taint", "cpus-online"})


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every finding by the name of its check, in order, and the verdict."""

    findings: Mapping[str, Finding]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return what `tdxhw doctor --json` prints for one host."""
        return {
            "verdict": self.verdict.name.lower().replace("_", "-"),
            "checks": [
                {
                    "name": check.name,
                    "title": check.title,
                    "status": self.findings[check.name].status.value,
                    "detail": self.findings[check.name].detail,
                    "remedy": self.findings[check.name].remedy,
                }
                for check in CHECKS
            ],
        }


def examine(facts: Facts, expects: Expectation | None = None) -> Diagnosis:
    """Answer every question about the host, and whether it is ready to run TDs.

    A failed check decides. An unknown one leaves the verdict open, unless KVM offering TDX VMs proves it
    anyway or it is only advice; what the lab file expects is never only advice.
    """
    expects = expects or Expectation()
    findings: dict[str, Finding] = {}
    titles = {check.name: check.title for check in CHECKS}
    for check in CHECKS:
        broken = next((name for name in check.needs if _fails(findings, name)), None)
        if broken:
            findings[check.name] = unknown(f"not looked at: '{titles[broken]}' failed", "")
        else:
            findings[check.name] = check.look(facts, expects)
    return Diagnosis(MappingProxyType(findings), _verdict(findings, expects))


def _fails(findings: Mapping[str, Finding], name: str) -> bool:
    return name in findings and findings[name].status is Status.FAIL


def _verdict(findings: Mapping[str, Finding], expects: Expectation) -> Verdict:
    if any(finding.status is Status.FAIL for finding in findings.values()):
        return Verdict.NOT_READY
    advice = _ADVICE - ({"tdx-module"} if expects.module else set())
    for check in CHECKS:
        if findings[check.name].status is not Status.UNKNOWN or check.name in advice:
            continue
        if not any(findings[proof].status is Status.PASS for proof in check.proven_by):
            return Verdict.COULD_NOT_TELL
    return Verdict.READY

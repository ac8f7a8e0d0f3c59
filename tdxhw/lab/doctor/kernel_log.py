"""What the kernel log says about TDX, in every wording from Linux 6.2 to 7.x.

The wording drifts, so it is evidence for *why*, never for *whether*: that is what /dev/kvm answers.
Sources: `arch/x86/virt/vmx/tdx/tdx.c` and `arch/x86/kvm/vmx/tdx.c` of the releases named below.
"""

import re
from dataclasses import dataclass
from typing import Final

_BIOS: Final = "in BIOS setup: TME on, TME multi-tenancy on, TDX on, SEAM loader on, TDX key split not 0"


@dataclass(frozen=True, slots=True)
class Reason:
    """One way in which the kernel says that it will not do TDX."""

    pattern: re.Pattern[str]
    meaning: str
    remedy: str


def _reason(pattern: str, meaning: str, remedy: str) -> Reason:
    return Reason(re.compile(pattern, re.IGNORECASE), meaning, remedy)


# First match wins: the particular before the general.
REASONS: Final = (
    _reason(
        r"Hibernation support is enabled",
        "the kernel refuses TDX while hibernation is possible",
        "add nohibernate to the kernel command line and reboot",
    ),
    _reason(
        r"(?:TDX[ -])?module not loaded|No TDX module loaded by BIOS",
        "no TDX module in memory: the firmware did not load one",
        "enable the SEAM loader in BIOS setup, or put a TDX module for this CPU into EFI/TDX of the ESP",
    ),
    _reason(
        r"too few private KeyIDs",
        "the BIOS left fewer than two private KeyIDs to TDX",
        "raise the TME-MT/TDX key split in BIOS setup",
    ),
    _reason(r"no TDX private KeyIDs available", "the BIOS gave TDX no private KeyIDs", _BIOS),
    _reason(
        r"TDX (?:is )?not (?:enabled|supported) by (?:BIOS|the host platform)",
        "TDX is off in the BIOS",
        _BIOS,
    ),
    _reason(
        r"RBP\) clobber bug present",
        "this TDX module corrupts RBP; the kernel refuses it",
        "update the TDX module (with the BIOS, or on the EFI system partition)",
    ),
    _reason(
        r"(?P<feature>XSAVE|MOVDIR64B|Self-snoop) is required for TDX",
        "a CPU feature that TDX needs is off",
        "remove clearcpuid= or noxsave from the kernel command line; update BIOS and microcode",
    ),
    _reason(
        r"requires kvm\.enable_virt_at_load=1",
        "KVM enables virtualization too late for TDX",
        "remove kvm.enable_virt_at_load=0 from the command line and from /etc/modprobe.d",
    ),
    _reason(
        r"MAX_VCPU_PER_TD",
        "the TDX module allows fewer vCPUs than this host has CPUs",
        "boot with nr_cpus= or offline CPUs, or update the TDX module",
    ),
    _reason(
        r"TDMRs exhausted",
        "the memory map is too fragmented for the TDX module",
        "turn memory hotplug reservations and NVDIMM interleaving off in BIOS setup",
    ),
    _reason(
        r"(?:TDX[ -])?module initialization failed \((?P<error>-\d+)\)",
        "the TDX module did not initialise",
        "look at the SEAMCALL line above it (`tdxhw decode STATUS` reads its status); update module and BIOS",
    ),
    _reason(
        r"virt/tdx: .*failed",
        "setting TDX up failed",
        "look the line up in arch/x86/virt/vmx/tdx/tdx.c of this kernel; update module and BIOS",
    ),
)

# "module initialized" (6.2 to 6.19) and "TDX-Module initialized" (7.x).
_INITIALIZED: Final = re.compile(r"\btdx: (?:TDX[ -])?module initialized", re.IGNORECASE)
_SEAMCALL_FAILED: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"SEAMCALL \((?P<leaf>0x[0-9a-f]+|\d+)\) failed: (?P<status>0x[0-9a-f]{1,16})",
        # Ubuntu's 6.2 and 6.5
        r"SEAMCALL failed: CPU \d+: leaf (?P<leaf>\d+), error (?P<status>0x[0-9a-f]{1,16})",
    )
)
_KEYID_RANGE: Final = re.compile(r"private KeyID range:? \[(?P<first>\d+), (?P<end>\d+)\)", re.IGNORECASE)
_DATE: Final = r"build[_ ]date:? (?P<date>(?:0x)?[0-9a-f]{8})"
_MAJOR_MINOR: Final = r"major_version (?P<major>\d+), minor_version (?P<minor>\d+)"
_VERSION: Final = r"(?P<version>\d+(?:\.\d+)+)"
_VERSIONS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # 6.2 and 6.8 trees: "TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 5,
        # build_date 20240129, build_num 698"
        rf"TDX module: .*{_MAJOR_MINOR}, {_DATE}, build_num (?P<build>\d+)",
        # 6.14-intel: "TDX module 1.5.06.00, build number 744, build date 0134d817"
        rf"TDX[ -]module {_VERSION}, build number (?P<build>\d+), {_DATE}",
        # "module version: 1.5.00.00.0481 (build_date 20230323)", "TDX-Module version: 1.5.24" (7.x)
        rf"tdx: (?:TDX[ -])?module version:? {_VERSION}(?:,? \(?{_DATE})?",
    )
)


@dataclass(frozen=True, slots=True)
class ModuleVersion:
    """The TDX module as the kernel reported it."""

    version: str  # "1.5.06.00"; only "1.5" where the kernel printed no more
    build: int | None = None
    build_date: str | None = None  # YYYYMMDD

    def __str__(self) -> str:
        """``1.5.06.00 (build 744, 2024-04-07)``."""
        date = self.build_date
        extras = [f"build {self.build}"] if self.build is not None else []
        extras += [f"{date[:4]}-{date[4:6]}-{date[6:]}"] if date else []
        return f"{self.version} ({', '.join(extras)})" if extras else self.version

    def is_older_than(self, floor: str) -> bool | None:
        """Compare as numbers. ``None`` if the kernel printed too little to tell."""
        mine, wanted = (tuple(int(part) for part in text.split(".")) for text in (self.version, floor))
        shared = min(len(mine), len(wanted))
        if mine[:shared] != wanted[:shared]:
            return mine[:shared] < wanted[:shared]
        return None if any(wanted[shared:]) else False


def _date(text: str | None) -> str | None:
    """One kernel prints the date, 20240407, in hexadecimal: 0134d817."""
    if text is None:
        return None
    digits = text.removeprefix("0x")
    if digits.isdigit() and digits.startswith("20"):
        return digits
    return str(int(digits, 16))


def module_version(lines: tuple[str, ...]) -> ModuleVersion | None:
    """Return the last version that the log reports, ``None`` if it reports none."""
    for line in reversed(lines):
        for pattern in _VERSIONS:
            match = pattern.search(line)
            if match:
                found = match.groupdict()
                version = found.get("version") or f"{found['major']}.{found['minor']}"
                build = found.get("build")
                return ModuleVersion(version, int(build) if build else None, _date(found.get("date")))
    return None


def keyid_range(lines: tuple[str, ...]) -> tuple[int, int] | None:
    """Return the first private KeyID and the one after the last."""
    for line in lines:
        match = _KEYID_RANGE.search(line)
        if match:
            return int(match["first"]), int(match["end"])
    return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How setting TDX up ended, by the last line that says so."""

    line: str
    reason: Reason | None  # None: it was initialised
    seamcall: tuple[int, int] | None  # leaf and status of the last SEAMCALL that failed before


def outcome(lines: tuple[str, ...]) -> Outcome | None:
    """Return how setting TDX up ended, ``None`` if the log does not say; the last attempt counts."""
    ended: Outcome | None = None
    seamcall: tuple[int, int] | None = None
    for line in lines:
        status = next(filter(None, (pattern.search(line) for pattern in _SEAMCALL_FAILED)), None)
        if status:
            seamcall = int(status["leaf"], 0), int(status["status"], 16)
        elif _INITIALIZED.search(line):
            ended = Outcome(line, None, None)
        elif "tdx" in line.lower():
            reason = next((reason for reason in REASONS if reason.pattern.search(line)), None)
            # A general line ("initialization failed (-5)") does not overrule the particular one before it.
            general = reason in REASONS[-2:]
            if reason is not None and not (general and ended is not None and ended.reason is not None):
                ended = Outcome(line, reason, seamcall)
    return ended

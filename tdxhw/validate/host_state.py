"""What is different about a host after a validation, and how bad that is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_MEMORY_SLACK_KIB: Final = 4096  # two boots of one kernel differ by some pages [KiB]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was."""

    what: str
    before: str
    after: str
    is_ours: bool  # something that was changed for the validation and is not back

    def __str__(self) -> str:
        """``not restored: boot files: 4 → 5 (+vmlinuz-7.2.13-good)``."""
        kind = "not restored" if self.is_ours else "differs after the reboot"
        return f"{kind}: {self.what}: {self.before} → {self.after}"


# What a validation changes has to be back. The rest says something about the host, and is told.
_OURS: Final = {
    "release": "kernel",
    "build_id": "build id of the kernel",
    "packages": "packages",
    "boot_files": "files in /boot",
    "kernel_links": "links to the default kernel",
    "module_folders": "folders in /lib/modules",
    "grub_digest": "GRUB's menu",
}
_TOLD: Final = {
    "cmdline": "command line",
    "parameters": "module parameters",
    "tainted": "taint",
    "modules": "loaded modules",
    "hkids": "HKIDs the platform has",
    "hkids_used": "HKIDs in use",
    "tdx_log": "what the kernel says about the TDX module",
}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return what is different, what is ours first."""
    found = []
    for names, is_ours in ((_OURS, True), (_TOLD, False)):
        for key, what in names.items():
            if before.get(key) != after.get(key):
                old, new = _both(key, before.get(key), after.get(key))
                found.append(Difference(what, old, new, is_ours))
    grubs = [survey.get("grub") or {} for survey in (before, after)]
    for key, what in (("environment", "GRUB's environment"), ("custom", "custom.cfg of GRUB")):
        was, now = (_choices(grub.get(key)) if key == "environment" else str(grub.get(key) or "") for grub in grubs)
        if was != now:
            found.insert(0, Difference(what, str(was or "-"), str(now or "-"), is_ours=True))
    memory = [int(survey.get("memory_kib") or 0) for survey in (before, after)]
    if abs(memory[0] - memory[1]) > _MEMORY_SLACK_KIB:
        # Where memory is missing, the TDX module still has it, or its metadata (PAMT) takes more.
        found.append(Difference("usable memory", f"{memory[0]} KiB", f"{memory[1]} KiB", is_ours=False))
    return found


def _choices(listing: object) -> list[str]:
    """Return what is chosen in GRUB's environment. Distributions keep notes of their own there, boot by boot."""
    lines = (line for line in str(listing or "").splitlines() if line.partition("=")[2])
    return sorted(line for line in lines if line.partition("=")[0] in ("next_entry", "saved_entry"))


def _both(key: str, before: Any, after: Any) -> tuple[str, str]:
    if key == "packages":
        before, after = (str(one or "").splitlines() for one in (before, after))
    if key == "parameters":
        before, after = ([f"{name}={value}" for name, value in (one or {}).items()] for one in (before, after))
    if isinstance(before, list) and isinstance(after, list):
        gone, new = (sorted(set(one) - set(other)) for one, other in ((before, after), (after, before)))
        changes = [f"+{item}" for item in new] + [f"-{item}" for item in gone]
        shown = " ".join(changes[:6]) + (f" and {len(changes) - 6} more" if len(changes) > 6 else "")
        return str(len(before)), f"{len(after)} ({shown})"
    if key in ("build_id", "grub_digest"):
        before, after = (str(one or "-")[:12] for one in (before, after))
    return ("-" if before is None else str(before)), ("-" if after is None else str(after))

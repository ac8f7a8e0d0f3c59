"""The configuration of a kernel: can it run TDs? Names as in Kconfig, older names beside newer ones."""

import re
from dataclasses import dataclass
from typing import Final

_SET: Final = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)
_OFF: Final = re.compile(r"^# (CONFIG_\w+) is not set$", re.MULTILINE)
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)")

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Option:
    """An option that has to be on, under any of its names (newest first)."""

    names: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """What it depends on: options that a user has to set first."""
    conflicts: tuple[tuple[str, Version], ...] = ()
    """What has to be off in kernels older than that."""
    since: Version = (0, 0)
    """The first mainline release that has it."""
    module: bool = False
    """Whether ``m`` will do."""
    selected: bool = False
    """Nobody sets it by hand: CONFIG_KVM_INTEL_TDX selects it."""


OPTIONS: Final = (
    Option(("CONFIG_KVM_INTEL",), needs=("CONFIG_KVM", "CONFIG_IA32_FEAT_CTL"), module=True),
    Option(
        ("CONFIG_INTEL_TDX_HOST",),
        needs=(
            "CONFIG_CPU_SUP_INTEL",
            "CONFIG_KVM_INTEL",
            "CONFIG_X86_X2APIC",
            "CONFIG_X86_MCE",
            "CONFIG_CONTIG_ALLOC",
        ),
        conflicts=(("CONFIG_KEXEC_CORE", (6, 18)),),
    ),
    Option(("CONFIG_KVM_INTEL_TDX",), needs=("CONFIG_INTEL_TDX_HOST",), since=(6, 16)),
    Option(("CONFIG_KVM_GUEST_MEMFD", "CONFIG_KVM_PRIVATE_MEM"), selected=True),  # renamed in 6.18
    Option(("CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES",), selected=True),
    Option(("CONFIG_HAVE_KVM_ARCH_GMEM_POPULATE", "CONFIG_KVM_GENERIC_PRIVATE_MEM"), selected=True),  # 6.18
)
"""In v17 there is no CONFIG_KVM_INTEL_TDX: CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL build KVM's part."""


def parse(text: str) -> dict[str, str]:
    """Return the options with their values as written, "n" where it says that one is not set.

    An option that is not in it is one that the kernel does not know, or that something else keeps from being asked for.
    """
    return dict.fromkeys(_OFF.findall(text), "n") | dict(_SET.findall(text))


def value_of(option: Option, config: dict[str, str]) -> tuple[str, str]:
    """Return the name under which the configuration has the option, and its value; the newest name and "" if none."""
    for name in option.names:
        if name in config:
            return name, config[name]
    return option.names[0], ""


def is_on(option: Option, config: dict[str, str]) -> bool:
    """Whether it is on, as a module too if that will do."""
    return value_of(option, config)[1] in (("y", "m") if option.module else ("y",))


def remedy(option: Option, config: dict[str, str], release: str) -> str:
    """Return what to do about an option that is off; nothing about one that another one selects."""
    if option.selected:
        return ""
    name = value_of(option, config)[0]
    found = _RELEASE.match(release)
    version = (int(found[1]), int(found[2])) if found else None
    if name not in config and version is not None and version < option.since:
        first = ".".join(map(str, option.since))
        return f"mainline has it since Linux {first}: a newer kernel, or one with the patches of v17"
    missing = [f"{need}=y" for need in option.needs if config.get(need) not in ("y", "m")]
    missing += [
        f"{other}=n (before Linux {'.'.join(map(str, until))})"
        for other, until in option.conflicts
        if config.get(other) == "y" and version is not None and version < until
    ]
    needs = f", which needs {', '.join(missing)}" if missing else ""
    return f"build with {name}=y{needs}"


def has_tdx(config: dict[str, str], dialect: str | None) -> bool:
    """Whether the configuration builds KVM's TDX, in the way of its dialect."""
    wanted = [option for option in OPTIONS if not option.selected]
    if dialect == "v17":
        wanted = [option for option in wanted if option.names != ("CONFIG_KVM_INTEL_TDX",)]
    return all(is_on(option, config) for option in wanted)

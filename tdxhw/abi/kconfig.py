"""The configuration of a kernel: can it run TDs? Names as in Kconfig, older names beside newer ones."""

import re
from dataclasses import dataclass
from typing import Final

_SET: Final = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Option:
    """An option that has to be on, under any of its names (newest first)."""

    names: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """What it depends on: options that a user has to set first."""
    module: bool = False
    """Whether ``m`` will do."""
    selected: bool = False
    """Nobody sets it by hand: CONFIG_KVM_INTEL_TDX selects it."""


OPTIONS: Final = (
    Option(("CONFIG_KVM_INTEL",), module=True),
    Option(
        ("CONFIG_INTEL_TDX_HOST",),
        needs=(
            "CONFIG_CPU_SUP_INTEL",
            "CONFIG_KVM_INTEL",
            "CONFIG_X86_X2APIC",
            "CONFIG_X86_MCE",
            "CONFIG_CONTIG_ALLOC",
        ),
    ),
    Option(("CONFIG_KVM_INTEL_TDX",), needs=("CONFIG_INTEL_TDX_HOST",)),
    Option(("CONFIG_KVM_GUEST_MEMFD", "CONFIG_KVM_PRIVATE_MEM"), selected=True),  # renamed in 6.18
    Option(("CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES",), selected=True),
    Option(("CONFIG_HAVE_KVM_ARCH_GMEM_POPULATE", "CONFIG_KVM_GENERIC_PRIVATE_MEM"), selected=True),  # 6.18
)
"""In v17 there is no CONFIG_KVM_INTEL_TDX: CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL build KVM's part."""


def parse(text: str) -> dict[str, str]:
    """Return the options that are set, with their values as written. What is not set is not in it."""
    return dict(_SET.findall(text))


def value_of(option: Option, config: dict[str, str]) -> tuple[str, str]:
    """Return the name under which the configuration has the option, and its value; the newest name and "" if none."""
    for name in option.names:
        if name in config:
            return name, config[name]
    return option.names[0], ""


def is_on(option: Option, config: dict[str, str]) -> bool:
    """Whether it is on, as a module too if that will do."""
    return value_of(option, config)[1] in (("y", "m") if option.module else ("y",))


def has_tdx(config: dict[str, str], dialect: str | None) -> bool:
    """Whether the configuration builds KVM's TDX, in the way of its dialect."""
    wanted = [option for option in OPTIONS if not option.selected]
    if dialect == "v17":
        wanted = [option for option in wanted if option.names != ("CONFIG_KVM_INTEL_TDX",)]
    return all(is_on(option, config) for option in wanted)

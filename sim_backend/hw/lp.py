"""Logical processors: where each sits, and which MSR values are its own."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class LogicalProcessor:
    """One hardware thread of the host."""

    index: int  # the number that SEAMCALLs and holds name it by
    package: int
    x2apic_id: int
    msrs: dict[int, int] = field(default_factory=dict)  # MSR -> value where it differs from the platform's
    cpuid: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)  # likewise


def logical_processors(count: int, packages: int) -> list[LogicalProcessor]:
    """Return `count` processors dealt in order to `packages`: the lower half to package 0, and so on.

    x2APIC ids leave bit 0 to a sibling thread that is switched off, as CPUID leaf 1FH of the platforms says.
    """
    if packages <= 0 or count < packages:
        raise ValueError(f"{count} logical processors cannot fill {packages} packages")
    return [
        LogicalProcessor(index=index, package=index * packages // count, x2apic_id=2 * index) for index in range(count)
    ]

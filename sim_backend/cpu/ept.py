"""EPT in memory: the walk that a CPU makes, over 64-bit words of simulated RAM.

Source: Intel SDM Vol. 3, "The Extended Page Table Mechanism (EPT)".
"""

from typing import Final

RWX: Final = 0b111
LARGE: Final = 1 << 7
SUPPRESS_VE: Final = 1 << 63
HPA_MASK: Final = 0x000F_FFFF_FFFF_F000
_RESERVED_MEMORY_TYPES: Final = frozenset({2, 3, 7})


class EptMisconfiguration(Exception):  # noqa: N818 - the SDM's name
    """An entry that no EPT may hold."""

    def __init__(self, entry: int, level: int) -> None:
        super().__init__(f"EPT misconfiguration: entry {entry:#x} at level {level}")
        self.entry = entry
        self.level = level


def walk(q: memoryview, root: int, top: int, gpa: int, hpa_mask: int = HPA_MASK) -> tuple[int, int, int]:
    """Walk to the entry that maps `gpa`; return the entry, its level and the R, W, X of the whole path.

    `root` is the HPA of the top table, `top` its level (3: four levels, 4: five), `hpa_mask` the HPA bits of an entry
    that address memory (without a KeyID). The walk ends at a leaf or at an entry that is not present.
    Raise `EptMisconfiguration` for an entry with reserved settings, and for a table outside RAM.
    """
    table = root
    access = RWX
    level = top
    shift = 12 + 9 * top
    while True:
        index = (table >> 3) + (gpa >> shift & 0x1FF)
        if index >= len(q):
            raise EptMisconfiguration(table, level)
        entry = q[index]
        access &= entry
        if not entry & RWX:
            return entry, level, 0
        if level == 0 or (entry & LARGE and level <= 2):
            _check_leaf(entry, level)
            return entry, level, access
        if entry & 0b11 == 0b10 or entry & 0xF8:
            raise EptMisconfiguration(entry, level)
        table = entry & hpa_mask
        level -= 1
        shift -= 9


def _check_leaf(entry: int, level: int) -> None:
    low_address_bits = HPA_MASK & (1 << 12 + 9 * level) - 1
    if entry & 0b11 == 0b10 or entry >> 3 & 7 in _RESERVED_MEMORY_TYPES or entry & low_address_bits:
        raise EptMisconfiguration(entry, level)


def page_of(entry: int, level: int, gpa: int, hpa_mask: int = HPA_MASK) -> int:
    """Return the HPA [4 KiB-aligned] of the 4 KiB page that leaf `entry` at `level` gives to `gpa`."""
    return entry & hpa_mask | gpa & (1 << 12 + 9 * level) - 1 & ~0xFFF

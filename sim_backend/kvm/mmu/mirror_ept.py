"""KVM's own copy of a TD's private mappings: the tree that KVM walks, because it cannot read the Secure EPT.

The real mirror EPT is a page table of the same shape as the module's. Here the tables above the leaves are
dictionaries (the HPA of the Secure-EPT page that KVM gave to the module), and the 512 entries under one
2 MiB range are one array, so that a densely mapped range costs 8 bytes a page.
"""

from array import array
from collections.abc import Iterator
from typing import Final

PRESENT: Final = 1
_ENTRIES: Final = 512
_EMPTY: Final = array("Q", bytes(8 * _ENTRIES))


class MirrorEpt:
    """Private mappings by GFN [4 KiB pages], all of 4 KiB, below a root of `levels` (4 or 5)."""

    def __init__(self, levels: int) -> None:
        self.levels: Final = levels
        self.mapped_pages = 0
        # tables[level][gfn >> 9 * level]: the Secure-EPT page below the entry at `level` (module's
        # numbering: 1 spans 2 MiB). The root belongs to the module.
        self.tables: Final[tuple[dict[int, int], ...]] = tuple({} for _ in range(levels))
        self._leaves: Final[dict[int, array[int]]] = {}

    def lookup(self, gfn: int) -> int:
        """Return the HPA that `gfn` maps to, or -1."""
        leaf = self._leaves.get(gfn >> 9)
        if leaf is None:
            return -1
        entry = leaf[gfn & 511]
        return entry & ~PRESENT if entry else -1

    def missing_tables(self, gfn: int) -> Iterator[tuple[int, int]]:
        """Yield (level, first GFN) of each table on the way to `gfn` that is not there, top down."""
        for level in range(self.levels - 1, 0, -1):
            key = gfn >> 9 * level
            if key not in self.tables[level]:
                yield level, key << 9 * level

    def link_table(self, gfn: int, level: int, hpa: int) -> None:
        """Record that the entry of `gfn` at `level` now points to the Secure-EPT page at `hpa`."""
        self.tables[level][gfn >> 9 * level] = hpa
        if level == 1:
            self._leaves[gfn >> 9] = _EMPTY[:]

    def map(self, gfn: int, hpa: int) -> None:
        """Map `gfn`, whose tables are there and which is not mapped."""
        self._leaves[gfn >> 9][gfn & 511] = hpa | PRESENT
        self.mapped_pages += 1

    def unmap(self, gfn: int) -> None:
        """Forget the mapping of `gfn`."""
        self._leaves[gfn >> 9][gfn & 511] = 0
        self.mapped_pages -= 1

    def mapped_gfns(self, start: int, end: int) -> Iterator[int]:
        """Yield the mapped GFNs of `start` (included) to `end` (excluded), ascending.

        The caller may unmap what it has just been given.
        """
        first, last = start >> 9, end - 1 >> 9
        if last - first < len(self._leaves):
            blocks = [block for block in range(first, last + 1) if block in self._leaves]
        else:
            blocks = sorted(block for block in self._leaves if first <= block <= last)
        for block in blocks:
            leaf = self._leaves[block]
            base = block << 9
            low, high = max(start - base, 0), min(end - base, _ENTRIES)
            if not any(leaf[low:high]):
                continue
            for index in range(low, high):
                if leaf[index]:
                    yield base + index

    def drop_tables(self) -> Iterator[int]:
        """Forget everything; yield the HPAs of the Secure-EPT pages, lowest level first."""
        self._leaves.clear()
        self.mapped_pages = 0
        for level in range(1, self.levels):
            pages = list(self.tables[level].values())
            self.tables[level].clear()
            yield from pages

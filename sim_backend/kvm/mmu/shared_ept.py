"""Extended page tables in simulated RAM: shared mappings of TDs, and all mappings of ordinary VMs.

The tables have the architectural format (Intel SDM Vol. 3, 30.3.2), because a CPU model walks them. KVM
finds its way with dictionaries of the same tables and never walks them itself.
"""

from collections.abc import Iterator
from typing import Final

from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kvm.host_pages import HostPages

READ: Final = 1
WRITE: Final = 2
EXECUTE: Final = 4
_MEMORY_TYPE_WB: Final = 6 << 3
_IGNORE_PAT: Final = 1 << 6
_TABLE: Final = READ | WRITE | EXECUTE
SUPPRESS_VE: Final = 1 << 63
"""Of an absent entry: an access exits to KVM. Clear: the guest gets a #VE."""
MMIO: Final = 1 << 58
"""Software bit of an absent entry with suppress-#VE clear: KVM has looked, no memslot is there."""
HPA_MASK: Final = (1 << 52) - (1 << 12)

_ENTRIES: Final = 512
_PAGE_BYTES: Final = 4096


class SharedEpt:
    """Mappings of 4 KiB below a root of `levels` (4 or 5).

    `gfn_bits` are OR-ed into every GFN to find its entry: the S-bit, for a TD, because hardware walks the
    shared tables with it in place. `absent` is the value of an entry that maps nothing.
    """

    def __init__(
        self, memory: PhysicalMemory, pages: HostPages, levels: int, *, gfn_bits: int = 0, absent: int = 0
    ) -> None:
        self.levels: Final = levels
        self.mapped_pages = 0
        self._memory: Final = memory
        self._pages: Final = pages
        self._gfn_bits: Final = gfn_bits
        self._blank: Final = absent.to_bytes(8, "little") * _ENTRIES
        self._absent: Final = absent
        # _tables[level][gfn >> 9 * level]: HPA of the table below the entry at `level`; the root is the
        # only one at level `levels`. Level 1 tables hold the leaves.
        self._tables: Final[tuple[dict[int, int], ...]] = tuple({} for _ in range(levels + 1))
        self.root: Final = self._new_table()

    def _new_table(self) -> int:
        hpa = self._pages.alloc()
        self._memory.b[hpa : hpa + _PAGE_BYTES] = self._blank
        return hpa

    def _leaf_table(self, gfn: int) -> int:
        """Return the HPA of the table that holds the leaf of `gfn`, making what is missing."""
        leaf = self._tables[1].get(gfn >> 9)
        if leaf is not None:
            return leaf
        table = self.root
        for level in range(self.levels - 1, 0, -1):
            key = gfn >> 9 * level
            below = self._tables[level].get(key)
            if below is None:
                below = self._new_table()
                self._tables[level][key] = below
                self._memory.q[(table >> 3) + (key & 511)] = below | _TABLE
            table = below
        return table

    def entry(self, gfn: int) -> int:
        """Return the leaf entry of `gfn`."""
        gfn |= self._gfn_bits
        table = self._tables[1].get(gfn >> 9)
        if table is None:
            return self._absent
        return self._memory.q[(table >> 3) + (gfn & 511)]

    def mapped(self) -> Iterator[tuple[int, int]]:
        """Yield (GFN without the S-bit, HPA) of every mapping."""
        q = self._memory.q
        for block, table in self._tables[1].items():
            for index, entry in enumerate(q[table >> 3 : (table >> 3) + _ENTRIES].tolist()):
                if entry & _TABLE:
                    yield (block << 9 | index) & ~self._gfn_bits, entry & HPA_MASK

    def table_pages(self) -> Iterator[int]:
        """Yield the HPA of every table, the root included."""
        yield self.root
        for tables in self._tables:
            yield from tables.values()

    def map(self, gfn: int, hpa: int, access: int) -> None:
        """Map `gfn` to the page at `hpa` with the rights `access`, in place of whatever was there.

        Raise `OutOfMemory` when a table page cannot be had.
        """
        gfn |= self._gfn_bits
        index = (self._leaf_table(gfn) >> 3) + (gfn & 511)
        q = self._memory.q
        if not q[index] & _TABLE:
            self.mapped_pages += 1
        q[index] = hpa | access | _MEMORY_TYPE_WB | _IGNORE_PAT

    def mark_mmio(self, gfn: int) -> None:
        """Make the next access to `gfn` raise a #VE in the guest instead of an exit."""
        gfn |= self._gfn_bits
        self._memory.q[(self._leaf_table(gfn) >> 3) + (gfn & 511)] = MMIO

    def write_protect(self, start: int, end: int) -> int:
        """Take write access from the mapped GFNs of [start, end); return how many had it."""
        q = self._memory.q
        count = 0
        for index in self._present_indices(start, end):
            if q[index] & WRITE:
                q[index] &= ~WRITE
                count += 1
        return count

    def unmap(self, start: int, end: int) -> int:
        """Drop the mappings of the GFNs of [start, end), MMIO marks too; return how many were mapped."""
        q = self._memory.q
        count = 0
        for index in self._present_indices(start, end, mmio=True):
            if q[index] & _TABLE:
                count += 1
            q[index] = self._absent
        self.mapped_pages -= count
        return count

    def _present_indices(self, start: int, end: int, *, mmio: bool = False) -> Iterator[int]:
        if end <= start:
            return
        start |= self._gfn_bits
        end = (end - 1 | self._gfn_bits) + 1
        tables = self._tables[1]
        first, last = start >> 9, end - 1 >> 9
        if last - first < len(tables):
            blocks = [block for block in range(first, last + 1) if block in tables]
        else:
            blocks = sorted(block for block in tables if first <= block <= last)
        wanted = _TABLE | MMIO if mmio else _TABLE
        q = self._memory.q
        for block in blocks:
            base = tables[block] >> 3
            low, high = max(start - (block << 9), 0), min(end - (block << 9), _ENTRIES)
            for index in range(base + low, base + high):
                if q[index] & wanted:
                    yield index

    def free(self) -> None:
        """Give every table page back. The object is unusable afterwards."""
        for tables in self._tables:
            for hpa in tables.values():
                self._pages.free(hpa)
            tables.clear()
        self._pages.free(self.root)

"""Physical Address Metadata Tables: what each page of a TDMR is used for, and its lock.

Entries are 16 bytes in the (simulated) memory that TDH.SYS.CONFIG gave: word 0 = lock [15:0] | page type [23:16] |
owner [63:24] (TDR's HPA >> 12), word 1 = BEPOCH. `memory.q` reaches a word by its index, HPA >> 3; such indexes
are what this file hands out. A free entry is all zeros, so fresh tables cost nothing.

Source: TDX Module 1.5 Base Architecture Specification, "Physical Page Metadata"; release 1.5.01.
"""

from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from sim_backend.hw.memory import PhysicalMemory
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.locks import EXCLUSIVE, HOST_PRIORITY, HP_READER
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Status

GIB: Final = 1 << 30
ENTRY_BYTES: Final = 16
_LOCK: Final = 0xFFFF
_TYPE_OR_LOCK: Final = 0xFF_FFFF
_CONTENTION: Final = EXCLUSIVE | HOST_PRIORITY
_TYPE_OR_CONTENTION: Final = 0xFF0000 | _CONTENTION


class PageType(IntEnum):
    """PAMT page type."""

    NDA = 0  # not directly assigned: free
    RSVD = 1
    REG = 3
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8


_P = PageType
_H = SeamcallLeaf

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from         leaf                             to
    (_P.NDA,       _H.TDH_MNG_CREATE):            _P.TDR,
    (_P.NDA,       _H.TDH_MNG_ADDCX):             _P.TDCX,
    (_P.NDA,       _H.TDH_VP_CREATE):             _P.TDVPR,
    (_P.NDA,       _H.TDH_VP_ADDCX):              _P.TDCX,
    (_P.NDA,       _H.TDH_MEM_SEPT_ADD):          _P.EPT,
    (_P.NDA,       _H.TDH_MEM_PAGE_DEMOTE):       _P.EPT,
    (_P.NDA,       _H.TDH_MEM_PAGE_ADD):          _P.REG,
    (_P.NDA,       _H.TDH_MEM_PAGE_AUG):          _P.REG,
    (_P.NDA,       _H.TDH_MEM_PAGE_RELOCATE):     _P.REG,
    (_P.REG,       _H.TDH_MEM_PAGE_RELOCATE):     _P.NDA,
    (_P.REG,       _H.TDH_MEM_PAGE_REMOVE):       _P.NDA,
    (_P.EPT,       _H.TDH_MEM_SEPT_REMOVE):       _P.NDA,
    (_P.EPT,       _H.TDH_MEM_PAGE_PROMOTE):      _P.NDA,
    (_P.TDR,       _H.TDH_PHYMEM_PAGE_RECLAIM):   _P.NDA,
    (_P.TDCX,      _H.TDH_PHYMEM_PAGE_RECLAIM):   _P.NDA,
    (_P.TDVPR,     _H.TDH_PHYMEM_PAGE_RECLAIM):   _P.NDA,
    (_P.EPT,       _H.TDH_PHYMEM_PAGE_RECLAIM):   _P.NDA,
    (_P.REG,       _H.TDH_PHYMEM_PAGE_RECLAIM):   _P.NDA,
})
"""What each leaf makes of a page. TDH.SYS.TDMR.INIT makes pages NDA, or RSVD in reserved areas."""
# fmt: on


@dataclass(slots=True)
class Tdmr:
    """One Trust Domain Memory Region as TDH.SYS.CONFIG accepted it. Addresses and sizes in bytes."""

    base: int
    size: int
    pamt_1g_base: int
    pamt_2m_base: int
    pamt_4k_base: int
    reserved: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), ascending
    next_to_initialize: int = 0  # HPA
    locked: bool = False  # by another LP in TDH.SYS.TDMR.INIT


class Pamt:
    """The PAMT blocks that are fully initialised, and the walk with its locks.

    `blocks` maps a physical gigabyte to the word indexes of its 1G entry, its first 2M entry and its first 4K
    entry. Locks taken by `lock` are noted in `held` (word index * 2 + exclusive); dispatch releases them all.
    """

    __slots__ = ("blocks", "held", "hpa_mask", "invalid_4k", "memory", "q")

    def __init__(self, memory: PhysicalMemory, hkid_start_bit: int) -> None:
        self.memory = memory
        self.q = memory.q
        self.blocks: dict[int, tuple[int, int, int]] = {}
        self.held: list[int] = []
        self.hpa_mask = ~((1 << hkid_start_bit) - 1)
        self.invalid_4k = self.hpa_mask | 0xFFF

    def add_block(self, tdmr: Tdmr, base: int) -> None:
        """Make the gigabyte at `base` of `tdmr` usable."""
        block = (base - tdmr.base) >> 30
        self.blocks[base >> 30] = (
            (tdmr.pamt_1g_base + block * ENTRY_BYTES) >> 3,
            (tdmr.pamt_2m_base + block * ENTRY_BYTES * 512) >> 3,
            (tdmr.pamt_4k_base + block * ENTRY_BYTES * 512 * 512) >> 3,
        )

    def initialize(self, tdmr: Tdmr, start: int, end: int) -> None:
        """Initialise the entries of `tdmr` from HPA `start` to `end` [4 MiB-aligned]; add finished gigabytes.

        Old contents of the tables are punched out, so that free memory needs none for its metadata.
        """
        first, last = (start - tdmr.base) >> 12, (end - tdmr.base) >> 12
        self.memory.discard(tdmr.pamt_4k_base + first * ENTRY_BYTES, (last - first) * ENTRY_BYTES)
        self._zero(tdmr.pamt_2m_base, first >> 9, last >> 9)
        self._zero(tdmr.pamt_1g_base, first >> 18, last >> 18)
        for offset, size in tdmr.reserved:
            begin, stop = max(first, offset >> 12), min(last, (offset + size) >> 12)
            if begin < stop:
                index = (tdmr.pamt_4k_base + begin * ENTRY_BYTES) >> 3
                words = array("Q", [PageType.RSVD << 16, 0]) * (stop - begin)
                self.q[index : index + len(words)] = words
        for gigabyte in range(start & -GIB, end & -GIB, GIB):
            self.add_block(tdmr, gigabyte)

    def _zero(self, table: int, first: int, last: int) -> None:
        """Zero entries `first` to `last` (exclusive) of the table at HPA `table`."""
        start, end = table + first * ENTRY_BYTES, table + last * ENTRY_BYTES
        self.memory.b[start:end] = bytes(end - start)

    def lock(self, hpa: int, page_type: int, operand: int, exclusive: int, level: int = 0) -> int:
        """Check and lock an explicit private page operand; return the word index of its entry.

        `exclusive` is 1 or 0, `level` 0 for a 4 KiB page, 1 for 2 MiB, 2 for 1 GiB. Raise OPERAND_INVALID (alignment,
        HKID bits), OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY or PAGE_METADATA_INCORRECT, each naming `operand`.
        """
        if not level and not hpa & self.invalid_4k:
            # The usual case in one go: nobody holds anything, and the page is what it should be.
            block = self.blocks.get(hpa >> 30)
            if block is not None:
                q = self.q
                index_1g, index_2m, index = block
                index_2m += hpa >> 20 & 0x3FE
                index += hpa >> 11 & 0x7FFFE
                word_1g, word_2m, word = q[index_1g], q[index_2m], q[index]
                if not (word_1g | word_2m) & _TYPE_OR_CONTENTION and word & _TYPE_OR_LOCK == page_type << 16:
                    q[index_1g] = word_1g + HP_READER
                    q[index_2m] = word_2m + HP_READER
                    q[index] = word + (EXCLUSIVE if exclusive else HP_READER)
                    self.held += (index_1g << 1, index_2m << 1, index << 1 | exclusive)
                    return index
        index, leaf_level = self.walk(hpa, operand, exclusive, level)
        if leaf_level != level or self.q[index] >> 16 & 0xFF != page_type:
            raise LeafError(Status.PAGE_METADATA_INCORRECT, operand)
        return index

    def is_idle(self, hpa: int) -> bool:
        """Tell whether nobody holds, or waits for, the locks on the way to the page at `hpa` [initialised block]."""
        q = self.q
        index_1g, index_2m, index = self.blocks[hpa >> 30]
        words = q[index_1g] | q[index_2m + (hpa >> 20 & 0x3FE)] | q[index + (hpa >> 11 & 0x7FFFE)]
        return not words & _LOCK

    def is_free(self, hpa: int) -> bool:
        """Tell whether `hpa` is a free 4 KiB page of an initialised block, and its locks are free as well."""
        block = None if hpa & self.invalid_4k else self.blocks.get(hpa >> 30)
        if block is None:
            return False
        q = self.q
        index_1g, index_2m, index = block
        words = q[index_1g] | q[index_2m + (hpa >> 20 & 0x3FE)] | q[index + (hpa >> 11 & 0x7FFFE)]
        return not words & _TYPE_OR_LOCK

    def walk(self, hpa: int, operand: int, exclusive: int, level: int = 0) -> tuple[int, int]:
        """Lock the entry that covers `hpa`, down to `level`; return its word index and the level it was found at.

        Upper entries are locked shared. An allocated 1 GiB or 2 MiB page ends the walk early.
        """
        if hpa & ((4096 << 9 * level) - 1) or hpa & self.hpa_mask:
            raise LeafError(Status.OPERAND_INVALID, operand)
        block = self.blocks.get(hpa >> 30)
        if block is None:
            raise LeafError(Status.OPERAND_ADDR_RANGE_ERROR, operand)
        q = self.q
        held = self.held

        index = block[0]
        word = q[index]
        if word & EXCLUSIVE:
            raise self._busy_shared(index, operand)
        q[index] = (word & ~HOST_PRIORITY) + HP_READER
        if word & 0xFF0000 == 0x030000 or level == 2:
            return self._end_walk_above(index, exclusive, operand), 2
        held.append(index << 1)

        index = block[1] + (hpa >> 20 & 0x3FE)
        word = q[index]
        if word & EXCLUSIVE:
            raise self._busy_shared(index, operand)
        q[index] = (word & ~HOST_PRIORITY) + HP_READER
        if word & 0xFF0000 == 0x030000 or level == 1:
            return self._end_walk_above(index, exclusive, operand), 1
        held.append(index << 1)

        index = block[2] + (hpa >> 11 & 0x7FFFE)
        word = q[index]
        if exclusive:
            if word & (_LOCK & ~HOST_PRIORITY):
                q[index] = word | HOST_PRIORITY
                raise LeafError(Status.OPERAND_BUSY, operand)
            q[index] = word & ~_LOCK | EXCLUSIVE
            held.append(index << 1 | 1)
        else:
            if word & EXCLUSIVE:
                raise self._busy_shared(index, operand)
            q[index] = (word & ~HOST_PRIORITY) + HP_READER
            held.append(index << 1)
        return index, 0

    def _end_walk_above(self, index: int, exclusive: int, operand: int) -> int:
        """Turn the shared lock just taken on a 1G or 2M entry into what the caller asked for."""
        q = self.q
        if exclusive:
            word = q[index]
            if word & _LOCK & ~HOST_PRIORITY != HP_READER:
                q[index] = (word - HP_READER) | HOST_PRIORITY
                raise LeafError(Status.OPERAND_BUSY, operand)
            q[index] = word & ~_LOCK | EXCLUSIVE
            self.held.append(index << 1 | 1)
        else:
            self.held.append(index << 1)
        return index

    def _busy_shared(self, index: int, operand: int) -> LeafError:
        """Leave behind what a host's failed shared acquisition does; return the error to raise."""
        word = self.q[index]
        self.q[index] = word & ~_LOCK | (word + HP_READER) & _LOCK | HOST_PRIORITY
        return LeafError(Status.OPERAND_BUSY, operand)

    def entry_4k(self, hpa: int) -> int:
        """Return the word index of the 4K entry of `hpa`, which is known to lie in an initialised block."""
        return self.blocks[hpa >> 30][2] + (hpa >> 11 & 0x7FFFE)

    def entry_2m(self, hpa: int) -> int:
        """Return the word index of the 2M entry of `hpa`, which is known to lie in an initialised block."""
        return self.blocks[hpa >> 30][1] + (hpa >> 20 & 0x3FE)

    def entry_1g(self, hpa: int) -> int:
        """Return the word index of the 1G entry of `hpa`, which is known to lie in an initialised block."""
        return self.blocks[hpa >> 30][0]

    def entry(self, hpa: int, level: int) -> int:
        """Return the word index of the entry of `hpa` at `level` (0 = 4K)."""
        return (self.entry_4k, self.entry_2m, self.entry_1g)[level](hpa)

    def lock_entry(self, index: int, operand: int, exclusive: int) -> None:
        """Lock one entry without a walk: the page is known from its owner or from the Secure EPT."""
        word = self.q[index]
        if exclusive:
            if word & (_LOCK & ~HOST_PRIORITY):
                self.q[index] = word | HOST_PRIORITY
                raise LeafError(Status.OPERAND_BUSY, operand)
            self.q[index] = word & ~_LOCK | EXCLUSIVE
        else:
            if word & EXCLUSIVE:
                raise self._busy_shared(index, operand)
            self.q[index] = (word & ~HOST_PRIORITY) + HP_READER
        self.held.append(index << 1 | exclusive)

    def path(self, hpa: int, owner: int) -> tuple[int, int, int, int]:
        """Return the entries (1G, 2M, 4K) on the way to the 4 KiB page `hpa`, and the 4K entry of its `owner`."""
        return self.entry_1g(hpa), self.entry_2m(hpa), self.entry_4k(hpa), self.entry_4k(owner)

    def lock_path(self, path: tuple[int, int, int, int]) -> bool:
        """Lock what `path` returned, all shared, if nobody has or wants any of it exclusively; else do nothing.

        For a page that is known to be what it should be; without success `lock` and `lock_entry` say why.
        """
        q = self.q
        first, second, third, owner = path
        word_1, word_2, word_3, word_4 = q[first], q[second], q[third], q[owner]
        if (word_1 | word_2 | word_3 | word_4) & _CONTENTION:
            return False
        q[first] = word_1 + HP_READER
        q[second] = word_2 + HP_READER
        q[third] = word_3 + HP_READER
        q[owner] = word_4 + HP_READER
        self.held += (first << 1, second << 1, third << 1, owner << 1)
        return True

    def page_type(self, index: int) -> int:
        """Return the `PageType` in the entry at word `index`."""
        return self.q[index] >> 16 & 0xFF

    def owner(self, index: int) -> int:
        """Return the HPA of the TDR that owns the page of the entry at word `index`."""
        return self.q[index] >> 24 << 12

    def set_page(self, index: int, page_type: int, owner: int) -> None:
        """Give the page of the entry at word `index` a type and an owner (a TDR's HPA); the lock stays."""
        self.q[index] = self.q[index] & _LOCK | page_type << 16 | owner << 12

    def set_page_type(self, index: int, page_type: int) -> None:
        """Change only the type: a freed page keeps its stale owner and BEPOCH, which PAGE.RDMD shows."""
        self.q[index] = self.q[index] & ~0xFF0000 | page_type << 16

    def is_2m_range_free(self, hpa: int) -> bool:
        """Tell whether each of the 512 4 KiB pages from `hpa` [2 MiB-aligned] is free."""
        first = self.entry_4k(hpa)
        words = self.q[first : first + 1024 : 2].tolist()
        return not any(word & 0xFF0000 for word in words)

    def demote(self, hpa: int, level: int, index: int) -> None:
        """Pass type and owner of the page of `level` at `hpa`, entry `index`, on to its 512 parts."""
        q = self.q
        word = q[index] & ~_LOCK
        first = self.entry(hpa, level - 1)
        locks = any(lock & _LOCK for lock in q[first : first + 1024 : 2].tolist())
        if locks:
            for child in range(first, first + 1024, 2):
                q[child], q[child + 1] = q[child] & _LOCK | word, 0
        else:
            q[first : first + 1024] = array("Q", [word, 0] * 512)
        self.set_page_type(index, PageType.NDA)

    def promote(self, hpa: int, level: int, index: int) -> None:
        """Give the page of `level` at `hpa`, entry `index`, type and owner of its 512 parts, and free those."""
        q = self.q
        first = self.entry(hpa, level - 1)
        word = q[first]
        q[index] = q[index] & _LOCK | word & ~_LOCK
        for child in range(first, first + 1024, 2):
            q[child] &= ~0xFF0000

    def release(self, held: list[int] | None = None) -> None:
        """Release the locks noted in `held`, by default those that the current leaf took, and empty the list."""
        q = self.q
        if held is None:
            held = self.held
        for noted in held:
            if noted & 1:
                q[noted >> 1] &= ~(_LOCK & ~HOST_PRIORITY)
            else:
                q[noted >> 1] -= HP_READER
        held.clear()

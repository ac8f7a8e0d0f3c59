"""What TDH.SYS.CONFIG demands of the TDMRs, their PAMTs and their reserved areas.

A range is (start, end) here, the end exclusive. Source: TDX Module 1.5 ABI Reference, TDH.SYS.CONFIG; release 1.5.01.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import ENTRY_BYTES, GIB, Tdmr
from uapi_ctypes.tdx_status import Status

TDMR_INFO_BYTES: Final = 512
MAX_RESERVED_AREAS: Final = 16
_TDMR_INFO: Final = Struct("<40Q32x")
_4K, _2M, _1G = 0, 1, 2
_PAGE_BYTES: Final = (4096, 1 << 21, GIB)
_U64_END: Final = 1 << 64

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TdmrInfo:
    """TDMR_INFO as the host wrote it [bytes]. `pamt` is (base, size) by page size: 4K, 2M, 1G."""

    base: int
    size: int
    pamt: tuple[Range, Range, Range]
    reserved: tuple[Range, ...]  # (offset, size), 16 of them; size 0 is a NULL entry

    @classmethod
    def decode(cls, data: bytes) -> "TdmrInfo":
        """Decode the first bytes of a TDMR_INFO entry."""
        base, size, base_1g, size_1g, base_2m, size_2m, base_4k, size_4k, *areas = _TDMR_INFO.unpack(data[:352])
        return cls(
            base,
            size,
            ((base_4k, size_4k), (base_2m, size_2m), (base_1g, size_1g)),
            tuple(zip(areas[::2], areas[1::2], strict=True)),
        )

    def available(self) -> Iterator[Range]:
        """Yield the ranges of the TDMR that are not reserved."""
        start, end = self.base, self.base + self.size
        for offset, size in self.reserved:
            if not size:
                break
            if start != self.base + offset:
                yield start, self.base + offset
            start = self.base + offset + size
        if start < end:
            yield start, end

    def to_tdmr(self) -> Tdmr:
        """Return what the module keeps of it."""
        return Tdmr(
            base=self.base,
            size=self.size,
            pamt_1g_base=self.pamt[_1G][0],
            pamt_2m_base=self.pamt[_2M][0],
            pamt_4k_base=self.pamt[_4K][0],
            reserved=[(offset, size) for offset, size in self.reserved if size],
            next_to_initialize=self.base,
        )


def check_tdmr(index: int, tdmrs: list[TdmrInfo], cmrs: list[Range], address_end: int) -> None:
    """Check TDMR number `index` against the ones before it. HPAs at or above `address_end` carry HKID bits.

    Raise the status with packed details: byte 0 the TDMR, byte 1 the reserved area or the PAMT's page size,
    byte 2 the other TDMR.
    """
    info = tdmrs[index]
    end = info.base + info.size

    # 1. Ascending and disjoint, whole gigabytes, no HKID bits.
    if end > _U64_END - 1:
        raise LeafError(Status.INVALID_TDMR, index)
    if index and info.base < tdmrs[index - 1].base + tdmrs[index - 1].size:
        raise LeafError(Status.NON_ORDERED_TDMR, index)
    if (info.base | info.size) & (GIB - 1) or not info.size or end > address_end:
        raise LeafError(Status.INVALID_TDMR, index)

    # 2. Reserved areas, then PAMTs, then the rest of the TDMR.
    _check_reserved_areas(index, info)
    _check_pamt_sizes(index, info, address_end)
    _check_pamt_overlaps(index, tdmrs)
    for page_size in (_1G, _2M, _4K):
        base, size = info.pamt[page_size]
        if not _is_convertible(base, base + size, cmrs):
            raise LeafError(Status.PAMT_OUTSIDE_CMRS, index | page_size << 8)
    for start, stop in info.available():
        if not _is_convertible(start, stop, cmrs):
            raise LeafError(Status.TDMR_OUTSIDE_CMRS, index)


def _check_reserved_areas(index: int, info: TdmrInfo) -> None:
    for area, (offset, size) in enumerate(info.reserved):
        detail = index | area << 8
        if not size:
            if area + 1 < MAX_RESERVED_AREAS and info.reserved[area + 1][1]:
                raise LeafError(Status.NON_ORDERED_RESERVED_IN_TDMR, detail)
            continue
        if offset + size > _U64_END - 1:
            raise LeafError(Status.INVALID_RESERVED_IN_TDMR, detail)
        if area and offset < sum(info.reserved[area - 1]):
            raise LeafError(Status.NON_ORDERED_RESERVED_IN_TDMR, detail)
        if (offset | size) & 0xFFF or offset + size > info.size:
            raise LeafError(Status.INVALID_RESERVED_IN_TDMR, detail)


def _check_pamt_sizes(index: int, info: TdmrInfo, address_end: int) -> None:
    for page_size in (_1G, _2M, _4K):
        base, size = info.pamt[page_size]
        if (
            base + size > address_end
            or (base | size) & 0xFFF
            or size < info.size // _PAGE_BYTES[page_size] * ENTRY_BYTES
        ):
            raise LeafError(Status.INVALID_PAMT, index | page_size << 8)


def _overlaps(first: Range, second: Range) -> bool:
    """Tell whether two (base, size) ranges share a byte."""
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]


def _check_pamt_overlaps(index: int, tdmrs: list[TdmrInfo]) -> None:
    info = tdmrs[index]
    # With the PAMTs of other TDMRs, then among themselves. (A 2M PAMT that overlaps the 1G one is named by its own
    # size, a 4K PAMT that overlaps any other one by 4K.)
    for other in range(index):
        for page_size in (_4K, _2M, _1G):
            if any(_overlaps(info.pamt[page_size], pamt) for pamt in tdmrs[other].pamt):
                raise LeafError(Status.PAMT_OVERLAP, index | page_size << 8 | other << 16)
    for page_size, bigger in ((_4K, _2M), (_4K, _1G), (_2M, _1G)):
        if _overlaps(info.pamt[page_size], info.pamt[bigger]):
            raise LeafError(Status.PAMT_OVERLAP, index | page_size << 8 | index << 16)

    # With memory that TDMRs offer: this one's PAMTs with all TDMRs so far, and the other way round.
    for other in range(index + 1):
        _check_pamt_outside(index, info, other, tdmrs[other])
        if other < index:
            _check_pamt_outside(other, tdmrs[other], index, info)


def _check_pamt_outside(owner: int, owner_info: TdmrInfo, other: int, other_info: TdmrInfo) -> None:
    for page_size in (_4K, _2M, _1G):
        pamt = owner_info.pamt[page_size]
        if any(_overlaps(pamt, (start, stop - start)) for start, stop in other_info.available()):
            raise LeafError(Status.PAMT_OVERLAP, owner | page_size << 8 | other << 16)


def _is_convertible(start: int, stop: int, cmrs: list[Range]) -> bool:
    """Tell whether a range lies in one CMR, or in several that touch."""
    merged_start = merged_stop = 0
    for base, size in cmrs:
        if not size:
            continue
        if base != merged_stop:
            merged_start = base
        merged_stop = base + size
        if merged_start <= start and stop <= merged_stop:
            return True
    return False

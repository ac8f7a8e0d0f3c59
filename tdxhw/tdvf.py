"""The metadata of a TDVF firmware image: what a VMM has to add to a TD, where, and what of it is measured.

Source: *Intel TDX Virtual Firmware Design Guide*, "TDVF Metadata". The descriptor is found through the table of
GUIDed structures that ends 32 bytes before the end of the image, or, in older images, through the 32-bit offset
that is stored in those last 32 bytes.
"""

import struct
import uuid
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from itertools import pairwise
from typing import Final

from tdxhw.errors import MeasureError

PAGE_SIZE: Final = 4096
_TABLE_END_OFFSET: Final = 0x20
"""From the end of the image [bytes]."""
_TABLE_FOOTER: Final = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_METADATA_OFFSET: Final = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_ENTRY_TAIL: Final = struct.Struct("<H16s")
"""Each entry ends with its length, itself included, and its GUID."""
_DESCRIPTOR: Final = struct.Struct("<4sIII")
_SECTION: Final = struct.Struct("<IIQQII")
_SIGNATURE: Final = b"TDVF"
_MOST_SECTIONS: Final = 1024


class SectionType(IntEnum):
    """What a section is."""

    BFV = 0
    """Boot firmware volume: code."""
    CFV = 1
    """Configuration firmware volume: UEFI variables."""
    TD_HOB = 2
    TEMP_MEM = 3
    PERM_MEM = 4
    PAYLOAD = 5
    PAYLOAD_PARAM = 6


class SectionAttribute(IntFlag):
    """What is done with a section."""

    MR_EXTEND = 1
    """Its contents are measured, by TDH.MR.EXTEND."""
    PAGE_AUG = 2
    """Not added while the TD is built: the guest accepts it later."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section of guest memory."""

    type: SectionType
    attributes: SectionAttribute
    gpa: int
    """[bytes, 4 KiB-aligned]."""
    size: int
    """[bytes, 4 KiB-aligned]."""
    data: bytes
    """What it holds; zeros follow up to `size`."""

    @property
    def is_measured(self) -> bool:
        """Whether TDH.MR.EXTEND measures the contents."""
        return bool(self.attributes & SectionAttribute.MR_EXTEND)

    @property
    def is_added(self) -> bool:
        """Whether TDH.MEM.PAGE.ADD adds it while the TD is built."""
        return not self.attributes & SectionAttribute.PAGE_AUG

    def page(self, index: int) -> bytes:
        """Return 4 KiB page number `index`."""
        return self.data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE].ljust(PAGE_SIZE, b"\0")

    @property
    def pages(self) -> int:
        """[4 KiB pages]."""
        return self.size // PAGE_SIZE


def parse(image: bytes) -> list[Section]:
    """Return the sections of a TDVF image in the order of its metadata. Raise `MeasureError` when it is none."""
    start = _find_descriptor(image)
    if start + _DESCRIPTOR.size > len(image):
        raise MeasureError("no TDVF image: the metadata descriptor lies beyond the end of the file")
    signature, length, version, count = _DESCRIPTOR.unpack_from(image, start)
    if signature != _SIGNATURE:
        raise MeasureError(f"no TDVF image: at {start:#x} there should be {_SIGNATURE!r}, not {signature!r}")
    if version != 1:
        raise MeasureError(f"the TDVF metadata has version {version}; only version 1 is known")
    if not 0 < count <= _MOST_SECTIONS or length < _DESCRIPTOR.size + count * _SECTION.size:
        raise MeasureError(f"damaged TDVF metadata: {count} sections in {length} bytes")
    if start + _DESCRIPTOR.size + count * _SECTION.size > len(image):
        raise MeasureError("truncated TDVF image: its metadata ends beyond the end of the file")
    first = start + _DESCRIPTOR.size
    sections = [_section(image, first + number * _SECTION.size, number) for number in range(count)]
    _check_overlaps(sections)
    return sections


def _find_descriptor(image: bytes) -> int:
    """Return where the descriptor is [bytes from the start]."""
    if len(image) < _TABLE_END_OFFSET + _ENTRY_TAIL.size:
        raise MeasureError(f"no TDVF image: only {len(image)} bytes")
    end = len(image) - _TABLE_END_OFFSET
    length, guid = _ENTRY_TAIL.unpack_from(image, end - _ENTRY_TAIL.size)
    if guid == _TABLE_FOOTER:
        from_end = _from_guid_table(image, end, length)
    else:
        from_end = int.from_bytes(image[end : end + 4], "little")
    if not 0 < from_end <= len(image):
        raise MeasureError("no TDVF image: neither a GUIDed table nor an offset to TDVF metadata at its end")
    return len(image) - from_end


def _from_guid_table(image: bytes, end: int, length: int) -> int:
    """Walk the table from its footer backwards; return the offset of the descriptor from the end of the image."""
    first = end - length
    if first < 0 or length < _ENTRY_TAIL.size:
        raise MeasureError(f"damaged image: its table of GUIDed structures is said to be {length} bytes long")
    position = end - _ENTRY_TAIL.size
    while position - _ENTRY_TAIL.size >= first:
        size, guid = _ENTRY_TAIL.unpack_from(image, position - _ENTRY_TAIL.size)
        if size < _ENTRY_TAIL.size or position - size < first:
            raise MeasureError("damaged image: an entry of its table of GUIDed structures has an impossible length")
        if guid == _METADATA_OFFSET:
            if size != _ENTRY_TAIL.size + 4:
                raise MeasureError(f"damaged image: its TDX metadata offset is an entry of {size} bytes")
            return int.from_bytes(image[position - size : position - size + 4], "little")
        position -= size
    raise MeasureError("no TDVF image: firmware without TDX metadata (its table of GUIDed structures has none)")


def _section(image: bytes, offset: int, number: int) -> Section:
    data_offset, raw_size, gpa, size, type_, attributes = _SECTION.unpack_from(image, offset)
    where = f"damaged TDVF metadata, section {number}"
    try:
        section_type = SectionType(type_)
    except ValueError:
        raise MeasureError(f"{where}: unknown type {type_}") from None
    if attributes & ~int(SectionAttribute.MR_EXTEND | SectionAttribute.PAGE_AUG):
        raise MeasureError(f"{where}: unknown attributes {attributes:#x}")
    if gpa % PAGE_SIZE or size % PAGE_SIZE:
        raise MeasureError(f"{where}: {size:#x} bytes at GPA {gpa:#x} are no whole pages")
    if raw_size > size:
        raise MeasureError(f"{where}: {raw_size:#x} bytes of data for {size:#x} bytes of memory")
    if data_offset + raw_size > len(image):
        raise MeasureError(f"{where}: its data ends beyond the end of the file (truncated image?)")
    data = image[data_offset : data_offset + raw_size]
    return Section(section_type, SectionAttribute(attributes), gpa, size, data)


def _check_overlaps(sections: list[Section]) -> None:
    """Refuse sections that share a page: TDH.MEM.PAGE.ADD adds a page once."""
    ordered = sorted((section for section in sections if section.is_added and section.size), key=lambda s: s.gpa)
    for lower, upper in pairwise(ordered):
        if lower.gpa + lower.size > upper.gpa:
            raise MeasureError(
                f"damaged TDVF metadata: {lower.type.name} and {upper.type.name} overlap at GPA {upper.gpa:#x}"
            )

"""Metadata lists: the packed form in which SYS.RDALL returns all fields.

A list is a header (size in bytes [15:0], number of sequences [31:16]) and sequences; a sequence is a field id whose
LAST_ELEMENT_IN_FIELD and LAST_FIELD_IN_SEQUENCE count what follows it, and the elements, 8 bytes each.

Spec: TDX Module ABI Reference, "Metadata Lists".
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING, Final

from sim_backend.tdx_module import metadata, metadata_sys
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import Access, Context, MetadataField
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_WORD: Final = 8
_HEADER_BITS: Final = metadata.SINGLE_ELEMENT_RESERVED | 1 << 51  # counts, reserved bits, WRITE_MASK_VALID


def dump_sys(module: TdxModule, start: int, access: Access, size: int) -> tuple[bytes, int, int]:
    """Return a list of at most `size` bytes from the field `start` on, the next field's id, and the status.

    The status is METADATA_LIST_OVERFLOW when not everything fitted. Raise METADATA_FIELD_ID_INCORRECT when `start`
    is not the id of a field.
    """
    field_id = start
    if metadata.is_null_field_id(field_id):
        field_id = metadata.next_field(Context.SYS, field_id, access)
    field = metadata.find(Context.SYS, field_id, 0)
    if field is None or not metadata.is_field_start(field, field_id):
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    field_id = field.field_id & ~0xFF_FFFF | field_id & 0xFF_FFFF

    sequences: list[bytes] = []
    room = size - _WORD
    while room >= _WORD + field.num_elem * _WORD:
        sequence, field_id = _sequence(module, field, field_id, access, room)
        if sequence:
            sequences.append(sequence)
            room -= len(sequence)
        if metadata.is_null_field_id(field_id):
            break
        following = metadata.find(Context.SYS, field_id, 0)
        assert following is not None, "enumeration yields existing fields"
        field = following
    body = b"".join(sequences)
    data = pack("<Q", _WORD + len(body) | len(sequences) << 16) + body
    complete = metadata.is_null_field_id(field_id)
    return data, field_id, (Status.SUCCESS if complete else Status.METADATA_LIST_OVERFLOW) << 32


def _sequence(module: TdxModule, field: MetadataField, field_id: int, access: Access, room: int) -> tuple[bytes, int]:
    """Return one sequence that starts with `field_id`, and the id of the field after it.

    A sequence holds fields of consecutive codes and the same shape. An unreadable first field makes it empty.
    """
    header_id, shape = field_id, (field.num_elem, field.size_code)
    elements: list[int] = []
    fields = 0
    room -= _WORD
    while room >= field.num_elem * _WORD:
        mask = field.rd[access]
        if mask:
            offset = (field_id & 0xFF_FFFF) - field.code
            elements += [metadata_sys.value(module, field, offset + i) & mask for i in range(field.num_elem)]
            fields += 1
            room -= field.num_elem * _WORD
        previous = field_id
        field_id = metadata.next_field(Context.SYS, field_id, access)
        if not mask or metadata.is_null_field_id(field_id):
            break
        following = metadata.find(Context.SYS, field_id, 0)
        assert following is not None, "enumeration yields existing fields"
        consecutive = (previous ^ field_id) >> 56 & 0x3F == 0 and field_id & 0xFF_FFFF == (
            previous & 0xFF_FFFF
        ) + field.num_elem
        field = following
        if not consecutive or (field.num_elem, field.size_code) != shape:
            break
    if not fields:
        return b"", field_id
    header = header_id & ~_HEADER_BITS | (shape[0] - 1) << 34 | (fields - 1) << 38
    return pack(f"<{1 + len(elements)}Q", header, *elements), field_id

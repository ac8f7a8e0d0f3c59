"""The metadata fields of the TDX module: their ids, who may read and write them, and their order.

Every field of the module's control structures has a 64-bit id. The table (metadata_fields.tsv) gives for each
the bits that the host (of a production or a DEBUG TD), the guest or a migration TD may read and write, in the
order in which RD with version 1 and TDH.SYS.RDALL enumerate them.

Spec: TDX Module Base Spec, "Metadata Access Interface"; ABI Reference, "MD_FIELD_ID".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from importlib.resources import files
from typing import Final

from sim_backend.tdx_module.cpuid_virtualization import CPUID_LOOKUP, CPUID_LOOKUP_SIZE, cpuid_index
from sim_backend.tdx_module.not_modelled import NotModelled

NULL_FIELD_ID: Final = (1 << 64) - 1
"""What RD takes to mean "the first field", and returns for "no further field"."""

CONTEXT_SHIFT: Final = 52
CONTEXT_MASK: Final = 7 << CONTEXT_SHIFT
_FIELD_CODE_MASK: Final = 0xFF_FFFF
_CLASS_SHIFT: Final = 56
# RESERVED_0 31:24, LAST_ELEMENT_IN_FIELD 37:34, LAST_FIELD_IN_SEQUENCE 46:38, RESERVED_1 49:47, RESERVED_2 55,
# RESERVED_3 62: all zero in the id of a single element.
SINGLE_ELEMENT_RESERVED: Final = 0xFF << 24 | 0xF << 34 | 0x1FF << 38 | 7 << 47 | 1 << 55 | 1 << 62

CPUID_VALUES_CLASS: Final = 20
L2_VMCS_CLASSES: Final = frozenset({36, 44, 52})
_SIZE_MASKS: Final = (0xFF, 0xFFFF, 0xFFFF_FFFF, NULL_FIELD_ID)


class Context(IntEnum):
    """CONTEXT_CODE: whose fields."""

    SYS = 0
    TD = 1
    VP = 2


class Access(IntEnum):
    """Who reads or writes: an index into `MetadataField.rd` and `.wr`."""

    HOST = 0  # of a production TD, or of the module itself
    HOST_DEBUG = 1  # of a TD with ATTRIBUTES.DEBUG
    GUEST = 2
    MIGTD = 3  # a bound migration TD, by TDG.SERVTD.RD/WR


@dataclass(frozen=True, slots=True)
class MetadataField:
    """One line of the table: `num_fields` fields of `num_elem` elements each, with consecutive codes."""

    table: str  # SYS, TD, VP or VP_VMCS
    name: str
    field_id: int
    num_fields: int
    num_elem: int
    rd: tuple[int, int, int, int]  # readable bits, by `Access`
    wr: tuple[int, int, int, int]  # writable bits, by `Access`
    class_code: int
    code: int  # FIELD_CODE of the first element
    end: int  # FIELD_CODE after the last element
    size_mask: int  # the bits of one element
    attribute: str  # the name of what models it: `name` in lower case

    @property
    def size_code(self) -> int:
        """ELEMENT_SIZE_CODE: the element has 1 << `size_code` bytes."""
        return self.field_id >> 32 & 3


def _load() -> Iterator[MetadataField]:
    text = files("sim_backend.tdx_module").joinpath("metadata_fields.tsv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines[1:]:
        cells = line.split("\t")
        field_id, count, elements = int(cells[2], 16), int(cells[3]), int(cells[4])
        masks = [int(cell, 16) for cell in cells[6:14]]
        code = field_id & _FIELD_CODE_MASK
        yield MetadataField(
            table=cells[0],
            name=cells[1],
            field_id=field_id,
            num_fields=count,
            num_elem=elements,
            rd=(masks[0], masks[2], masks[4], masks[6]),
            wr=(masks[1], masks[3], masks[5], masks[7]),
            class_code=field_id >> _CLASS_SHIFT & 0x3F,
            code=code,
            end=code + count * elements,
            size_mask=_SIZE_MASKS[field_id >> 32 & 3],
            attribute=cells[1].lower(),
        )


FIELDS: Final = tuple(_load())
"""All fields, table by table, in enumeration order."""

# A context enumerates its tables in this order: the TD VMCS comes before the rest of the TDVPS.
_ORDER: Final = {
    Context.SYS: tuple(field for field in FIELDS if field.table == "SYS"),
    Context.TD: tuple(field for field in FIELDS if field.table == "TD"),
    Context.VP: tuple(field for field in FIELDS if field.table == "VP_VMCS")
    + tuple(field for field in FIELDS if field.table == "VP"),
}
_POSITION: Final = {id(field): index for order in _ORDER.values() for index, field in enumerate(order)}
_BY_CLASS: Final = {
    context: {
        class_code: tuple(field for field in order if field.class_code == class_code)
        for class_code in {field.class_code for field in order}
    }
    for context, order in _ORDER.items()
}
_VMCS_ARRAYS: Final = {0x2000: 2, 0x201C: 4, 0x280A: 4, 0x6008: 4}
"""Codes and lengths of the VMCS fields that are one line of the module's table: within it a caller's id bits stay."""
_NOT_LAST_IN_ARRAY: Final = frozenset(
    first + 2 * index for first, count in _VMCS_ARRAYS.items() for index in range(count - 1)
)
_ENTRIES_PER_L2_VM: Final = {Context.SYS: 0, Context.TD: 1, Context.VP: 3}
_MAX_L2_VMS: Final = 3


def is_null_field_id(field_id: int) -> bool:
    """Tell whether `field_id` is all ones, whatever its CONTEXT_CODE."""
    return field_id | CONTEXT_MASK == NULL_FIELD_ID


def with_context(field_id: int, context: Context) -> int:
    """Return `field_id` with its CONTEXT_CODE replaced: on input it is ignored."""
    return field_id & ~CONTEXT_MASK | context << CONTEXT_SHIFT


def find(context: Context, field_id: int, num_l2_vms: int) -> MetadataField | None:
    """Return the field that holds the element `field_id`, or None when there is none.

    CONTEXT_CODE, sizes and the NON_ARCH bit are ignored, as the module does. Fields of L2 VMs exist only as far as
    the TD has L2 VMs; the L2 VMCS itself raises `NotModelled`.
    """
    class_code = field_id >> _CLASS_SHIFT & 0x3F
    code = field_id & _FIELD_CODE_MASK
    if class_code == CPUID_VALUES_CLASS and context is Context.TD:
        code &= 1  # the rest is the CPUID leaf and subleaf
    if class_code in L2_VMCS_CLASSES and context is Context.VP:
        if (class_code - 28) // 8 > num_l2_vms:
            return None
        raise NotModelled("metadata of an L2 VMCS")
    for field in _BY_CLASS[context].get(class_code, ()):
        if field.code <= code < field.end:
            order = _ORDER[context]
            exists = len(order) - _ENTRIES_PER_L2_VM[context] * (_MAX_L2_VMS - num_l2_vms)
            return field if _POSITION[id(field)] < exists else None
    return None


def is_field_start(field: MetadataField, field_id: int) -> bool:
    """Tell whether `field_id` names the first element of a field, with the right element size."""
    offset = (field_id & _FIELD_CODE_MASK) - field.code
    return offset % field.num_elem == 0 and field_id >> 32 & 3 == field.size_code


def cpuid_leaf_of(field_id: int) -> tuple[int, int | None]:
    """Return the CPUID leaf and subleaf (None: the leaf has no subleaves) that a CPUID_VALUES id encodes."""
    leaf = field_id >> 9 & 0x7F | (field_id >> 16 & 1) << 31
    return leaf, None if field_id >> 8 & 1 else field_id >> 1 & 0x7F


def _cpuid_field_id(field_id: int, index: int) -> int:
    row = CPUID_LOOKUP[index]
    code = (row.leaf & 0x7F) << 9 | (row.leaf >> 31) << 16
    # A leaf without subleaves has subleaf 0xffffffff: all ones in the 7 bits, and the "not applicable" bit.
    code |= 0x1FE if row.subleaf is None else (row.subleaf & 0x7F) << 1
    return field_id & ~0x1FFFF | code


def _first_id(field: MetadataField) -> int:
    if field.class_code == CPUID_VALUES_CLASS and field.table == "TD":
        return _cpuid_field_id(field.field_id, 0)
    return field.field_id


def _next_in_field(field: MetadataField, field_id: int, step: int) -> int | None:
    """Return the id after `field_id` in the same table line; `step` is 1, or `num_elem` to go to the next field."""
    if field.class_code == CPUID_VALUES_CLASS and field.table == "TD":
        if step == 1 and not field_id & 1:
            return field_id + 1
        leaf, subleaf = cpuid_leaf_of(field_id)
        index = cpuid_index(leaf, 0xFFFF_FFFF if subleaf is None else subleaf)
        if index is None or index + 1 == CPUID_LOOKUP_SIZE:
            return None
        return _cpuid_field_id(field_id, index + 1) & ~1
    if field.table == "VP_VMCS":
        return field_id + 2 if field.code in _NOT_LAST_IN_ARRAY else None
    following = (field_id & _FIELD_CODE_MASK) + step
    if step != 1:
        following -= ((field_id & _FIELD_CODE_MASK) - field.code) % field.num_elem
    return field_id & ~_FIELD_CODE_MASK | following if following < field.end else None


def _next(context: Context, field_id: int, access: Access, *, write: bool, num_l2_vms: int, whole_fields: bool) -> int:
    order = _ORDER[context]
    exists = len(order) - _ENTRIES_PER_L2_VM[context] * (_MAX_L2_VMS - num_l2_vms)
    position = 0
    if not is_null_field_id(field_id):
        field = find(context, field_id, num_l2_vms)
        assert field is not None, "only the id of an existing element has a successor"
        masks = field.wr if write else field.rd
        if masks[access]:
            inside = _next_in_field(field, field_id, field.num_elem if whole_fields else 1)
            if inside is not None:
                return inside
        position = _POSITION[id(field)] + 1
    for field in order[position:exists]:
        if (field.wr if write else field.rd)[access]:
            if field.class_code in L2_VMCS_CLASSES and context is Context.VP:
                raise NotModelled("metadata of an L2 VMCS")
            return _first_id(field)
    return NULL_FIELD_ID


def next_element(context: Context, field_id: int, access: Access, *, num_l2_vms: int = 0) -> int:
    """Return the id of the next readable element after `field_id`, or `NULL_FIELD_ID`.

    The null id asks for the first. Within a table line the caller's own id bits are kept, as the module does.
    """
    return _next(context, field_id, access, write=False, num_l2_vms=num_l2_vms, whole_fields=False)


def next_field(context: Context, field_id: int, access: Access, *, num_l2_vms: int = 0) -> int:
    """Return the id of the next readable field after the one at `field_id`, or `NULL_FIELD_ID`."""
    return _next(context, field_id, access, write=False, num_l2_vms=num_l2_vms, whole_fields=True)

"""Reading and writing the metadata of a TD: TDR and TDCS fields.

Spec: TDX Module ABI Reference, "TD-Scope Metadata".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sim_backend.tdx_module import metadata
from sim_backend.tdx_module.cpuid_virtualization import CPUID_LOOKUP, CPUID_LOOKUP_SIZE, cpuid_index
from sim_backend.tdx_module.errors import LeafError, SimBug
from sim_backend.tdx_module.metadata import Access, Context, MetadataField
from sim_backend.tdx_module.td_params import ATTR_DEBUG, FLAG_FLEXIBLE_PENDING_VE, microseconds_to_tsc
from sim_backend.tdx_module.tdcs import MIGSC_LINKS_PAGE, MSR_BITMAP_PAGE, ROOT_SEPT_PAGE
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdr import Tdr

_ALL_ONES: Final = (1 << 64) - 1
_TDR_CLASSES: Final = frozenset({0, 1, 2})
_MIN_HP_LOCK_TIMEOUT_US: Final = 10_000
_MAX_HP_LOCK_TIMEOUT_US: Final = 100_000_000
TD_CTLS_PENDING_VE_DISABLE: Final = 1

# Fields that are whole pages of TDCS memory: the TDCX page they are in.
_PAGES: Final = {
    "MIGSC_LINKS": MIGSC_LINKS_PAGE, "MSR_BITMAPS": MSR_BITMAP_PAGE, "SEPT_ROOT": ROOT_SEPT_PAGE,
    "L2_SEPT_ROOT_1": 6, "L2_SEPT_ROOT_2": 7, "L2_SEPT_ROOT_3": 8,
}  # fmt: skip


def host_access(tdr: Tdr) -> Access:
    """Return with what rights the host reads this TD."""
    return Access.HOST_DEBUG if tdr.tdcs.attributes & ATTR_DEBUG else Access.HOST


def find(tdr: Tdr, field_id: int) -> MetadataField:
    """Return the field of the element `field_id` (its CONTEXT_CODE is already TD's), or raise."""
    if field_id & metadata.SINGLE_ELEMENT_RESERVED:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    field = metadata.find(Context.TD, field_id, tdr.tdcs.num_l2_vms)
    if field is None:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    return field


def read_element(module: TdxModule, tdr: Tdr, field_id: int, access: Access) -> int:
    """Return the bits of the element that `access` may read; raise METADATA_FIELD_*.

    A migration TD that begins to read MIG_ENC_KEY gets a new one each time, or RND_NO_ENTROPY.
    """
    field = find(tdr, field_id)
    if field.name == "MIG_ENC_KEY" and access is Access.MIGTD and field_id & 0xFF_FFFF == field.code:
        tdr.tdcs.mig_enc_key = module.random_256()
    value = _value(module, tdr, field, field_id)
    mask = field.rd[access]
    if not mask:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    return value & mask


def next_element(tdr: Tdr, field_id: int, access: Access) -> int:
    """Return the id after `field_id` that `access` may read."""
    return metadata.next_element(Context.TD, field_id, access, num_l2_vms=tdr.tdcs.num_l2_vms)


def write_element(module: TdxModule, tdr: Tdr, field_id: int, access: Access, value: int, mask: int) -> int:
    """Write the bits `mask` of the element and return its old value; raise METADATA_FIELD_*."""
    field = find(tdr, field_id)
    old = _value(module, tdr, field, field_id)
    writable = field.wr[access]
    written = writable & mask
    if not written:
        raise LeafError(Status.METADATA_FIELD_NOT_WRITABLE)
    if (old ^ value) & mask & ~writable:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    new = old & ~written | value & written
    special = _SPECIAL_WRITES.get(field.name)
    if special is not None:
        special(_Write(module, tdr, access, old, new, written))
    elif field.name == "MIG_DEC_KEY":
        _write_mig_dec_key(tdr, field, field_id, new)
    else:
        _store(tdr, field, field_id, new)
    return old & field.rd[access]


def _value(module: TdxModule, tdr: Tdr, field: MetadataField, field_id: int) -> int:
    """Return the whole element; raise METADATA_FIELD_ID_INCORRECT or NOT_READABLE for a CPUID leaf."""
    if field.class_code == metadata.CPUID_VALUES_CLASS:
        return _cpuid_value(tdr, field_id)
    offset = (field_id & 0xFF_FFFF) - field.code
    page = _PAGES.get(field.name)
    if page is not None:
        return module.q[(tdr.tdcx_pa[page] >> 3) + offset]
    name = field.name
    if name == "TDCX_PA":
        hkid = tdr.hkid << module.hkid_start_bit
        return tdr.tdcx_pa[offset] | hkid if offset < tdr.num_tdcx else 0
    if name == "HP_LOCK_TIMEOUT":
        return tdr.tdcs.hp_lock_timeout * 1_000_000 // _native_tsc_frequency(module)
    if name == "NUM_CPUID_VALUES":
        return CPUID_LOOKUP_SIZE
    if name == "SERVTD_BINDINGS_TABLE":
        binding = tdr.tdcs.servtd_bindings
        return int.from_bytes(binding[0].encode()[8 * offset : 8 * offset + 8], "little") if binding else 0
    if name.startswith("VIRTUAL_IA32_VMX_"):
        return tdr.tdcs.virtual_vmx_msrs.get(field.code, 0)
    owner = tdr if field.class_code in _TDR_CLASSES else tdr.tdcs
    value = getattr(owner, field.attribute, None)
    if value is None:
        return owner.fields.get(field.field_id + offset, 0)
    return _element(value, field, offset) & field.size_mask


def _element(value: object, field: MetadataField, offset: int) -> int:
    """Return element `offset` of an attribute: a number, a list of numbers, a digest, or a list of digests."""
    if isinstance(value, list):
        if value and isinstance(value[0], bytes):
            return _element(value[offset // field.num_elem], field, offset % field.num_elem)
        return int(value[offset])
    if isinstance(value, bytes):
        return int.from_bytes(value[8 * offset : 8 * offset + 8], "little")
    if isinstance(value, int):
        return value
    raise SimBug(f"metadata field {field.name} has no value")


def _cpuid_value(tdr: Tdr, field_id: int) -> int:
    if field_id & 0xFFFE_0000:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    leaf, subleaf = metadata.cpuid_leaf_of(field_id)
    index = cpuid_index(leaf, 0xFFFF_FFFF if subleaf is None else subleaf)
    if index is None:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    if CPUID_LOOKUP[index].faulting or not tdr.tdcs.cpuid_valid[index]:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    return tdr.tdcs.cpuid_values[index][field_id & 1]


def _native_tsc_frequency(module: TdxModule) -> int:
    if module.capabilities is None:
        raise SimBug("a TD before TDH.SYS.INIT")
    return module.capabilities.native_tsc_frequency


def _store(tdr: Tdr, field: MetadataField, field_id: int, value: int) -> None:
    offset = (field_id & 0xFF_FFFF) - field.code
    owner = tdr if field.class_code in _TDR_CLASSES else tdr.tdcs
    attribute = getattr(owner, field.attribute, None)
    if attribute is None:
        owner.fields[field.field_id + offset] = value
    elif isinstance(attribute, list):
        attribute[offset] = value
    else:
        setattr(owner, field.attribute, value)


@dataclass(frozen=True, slots=True)
class _Write:
    """A write to an element that is more than storing a value."""

    module: TdxModule
    tdr: Tdr
    access: Access
    old: int
    new: int
    written: int  # the bits that are written


def _write_hp_lock_timeout(write: _Write) -> None:
    if write.written != _ALL_ONES:
        raise LeafError(Status.METADATA_WR_MASK_NOT_VALID)
    if not _MIN_HP_LOCK_TIMEOUT_US <= write.new <= _MAX_HP_LOCK_TIMEOUT_US:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    # The module keeps 32 bits of TSC ticks: a time-out of more than 2^32 ticks wraps.
    ticks = microseconds_to_tsc(write.new, _native_tsc_frequency(write.module))
    write.tdr.tdcs.hp_lock_timeout = ticks & 0xFFFF_FFFF


def _write_td_ctls(write: _Write) -> None:
    tdcs = write.tdr.tdcs
    flexible = tdcs.config_flags & FLAG_FLEXIBLE_PENDING_VE
    if write.access is Access.GUEST and (write.old ^ write.new) & TD_CTLS_PENDING_VE_DISABLE and not flexible:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    tdcs.td_ctls = write.new


def _write_mig_version(write: _Write) -> None:
    if write.new != 0:  # the only migration protocol version of 1.5.01
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    write.tdr.tdcs.mig_version = write.new


def _write_mig_dec_key(tdr: Tdr, field: MetadataField, field_id: int, value: int) -> None:
    _store(tdr, field, field_id, value)
    tdr.tdcs.mig_dec_key_set = True  # any of its elements counts


_SPECIAL_WRITES: Final[dict[str, Callable[[_Write], None]]] = {
    "HP_LOCK_TIMEOUT": _write_hp_lock_timeout,
    "TD_CTLS": _write_td_ctls,
    "MIG_VERSION": _write_mig_version,
}

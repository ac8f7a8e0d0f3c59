"""uapi structures as flat mappings from field path to value: ``cs.base``, ``args[0]``, ``cpuid[0x7,0].eax``.

Zero fields are left out, so that a structure that grew at its end still compares. Descriptors and addresses become
names. Byte areas of 128 bytes and more (LAPIC, XSAVE, IOAPIC) are shown by 32-bit word: ``regs[0x390]``.
"""

import ctypes
from typing import Any, Final, TypeAlias

from tdxhw.diff.names import Names
from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kvm import (
    KvmClearDirtyLog,
    KvmCreateDevice,
    KvmDeviceAttr,
    KvmDirtyLog,
    KvmEncRegion,
    KvmIoeventfd,
    KvmIrqfd,
    KvmMsrFilterRange,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
)
from uapi_ctypes.kvm_state import KvmCpuidEntry, KvmCpuidEntry2, KvmMsrEntry, KvmOneReg
from uapi_ctypes.tdx_mainline import KvmTdxCmd, KvmTdxCmdId, KvmTdxInitMemRegion
from uapi_ctypes.tdx_v17 import KvmTdxCmdV17

Value: TypeAlias = "int | str | list[int]"
Fields: TypeAlias = dict[str, Value]

_FDS: Final = {
    (KvmUserspaceMemoryRegion2, "guest_memfd"), (KvmIrqfd, "fd"), (KvmIrqfd, "resamplefd"), (KvmIoeventfd, "fd"),
}  # fmt: skip
_ADDRESSES: Final[dict[tuple[type[Any], str], str]] = {
    # field: the one that says how many bytes are there; without, what is there is a structure of the caller's
    (KvmUserspaceMemoryRegion, "userspace_addr"): "memory_size",
    (KvmUserspaceMemoryRegion2, "userspace_addr"): "memory_size",
    (KvmDirtyLog, "dirty_bitmap"): "",
    (KvmClearDirtyLog, "dirty_bitmap"): "",
    (KvmDeviceAttr, "addr"): "",
    (KvmOneReg, "addr"): "",
    (KvmMsrFilterRange, "bitmap"): "",
    (KvmEncRegion, "addr"): "size",
    (KvmTdxCmd, "data"): "",
    (KvmTdxCmdV17, "data"): "",
    (KvmTdxInitMemRegion, "source_addr"): "",
}
_TDX_COMMANDS: Final = (KvmTdxCmd, KvmTdxCmdV17)  # INIT_VCPU has the same number in both
_CREATED_FD: Final = (KvmCreateDevice, "fd")
_WORD_AREA: Final = 128
"""Bytes from which an area is shown by word."""
_BYTES: Final = (ctypes.c_uint8, ctypes.c_char)
_AREA_ITEMS: Final = (*_BYTES, ctypes.c_uint32)
_INTEGERS: Final = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int16)


def fields_of(value: Any, names: Names, prefix: str = "") -> Fields:
    """Return the non-zero fields of the ctypes object `value`."""
    found: Fields = {}
    if isinstance(value, ctypes.Array):
        _array(value, prefix, names, found)
    else:
        _structure(value, prefix, names, found)
    return found


def changes(before: Fields, after: Fields) -> Fields:
    """Return the fields of `after` that are not as `before`, and zero for those that vanished."""
    changed: Fields = {path: value for path, value in after.items() if before.get(path) != value}
    changed.update((path, 0) for path in before if path not in after)
    return changed


def _structure(value: Any, prefix: str, names: Names, found: Fields) -> None:
    kind = type(value)
    anonymous = getattr(kind, "_anonymous_", ())
    for name, field_type, *_ in kind._fields_:
        path = f"{prefix}{name}"
        if issubclass(field_type, ctypes.Array) and field_type._type_ is ctypes.c_char:
            # ctypes would end it at its first zero byte.
            offset = getattr(kind, name).offset
            _array((ctypes.c_uint8 * field_type._length_).from_buffer(value, offset), path, names, found)
            continue
        member = getattr(value, name)
        if field_type in _INTEGERS:
            if member:
                found[path] = _number(value, kind, name, member, names)
        elif issubclass(field_type, ctypes.Array):
            _array(member, path, names, found)
        else:
            inner = prefix if name in anonymous else f"{path}."
            _structure(member, inner, names, found)
    if isinstance(value, Flexible):
        _entries(value, prefix, names, found)


def _number(value: Any, kind: type[Any], name: str, member: int, names: Names) -> Value:
    if (kind, name) in _FDS:
        return names.of_fd(member)
    if name == "data" and kind in _TDX_COMMANDS and value.id == KvmTdxCmdId.KVM_TDX_INIT_VCPU:
        return member  # an immediate: what the guest finds in RCX
    if (kind, name) == _CREATED_FD:
        return "a descriptor"  # the recording kernel puts the new object's name here
    length = _ADDRESSES.get((kind, name))
    if length is not None:
        return names.of_address(member, getattr(value, length) if length else 0)
    return member


def _array(value: "ctypes.Array[Any]", path: str, names: Names, found: Fields) -> None:
    item = value._type_
    if item in _AREA_ITEMS and ctypes.sizeof(value) >= _WORD_AREA:
        raw = bytes(value)
        for offset in range(0, len(raw) & ~3, 4):
            if word := int.from_bytes(raw[offset : offset + 4], "little"):
                found[f"{path}[{offset:#x}]"] = word
    elif item in _BYTES:
        if any(raw := bytes(value)):
            found[path] = "hex:" + raw.rstrip(b"\0").hex()
    else:
        for index, member in enumerate(value):
            if isinstance(member, ctypes.Structure):
                _structure(member, f"{path}[{index}].", names, found)
            elif isinstance(member, ctypes.Array):
                _array(member, f"{path}[{index}]", names, found)
            elif member:
                found[f"{path}[{index}]"] = member


def _entries(value: Flexible[Any], prefix: str, names: Names, found: Fields) -> None:
    """Add the entries behind a structure: CPUID by leaf, MSRs by index, others by position."""
    entry = value._entry_
    filled = value.filled()
    if entry in _INTEGERS:
        if any(filled):
            found[f"{prefix}entries"] = list(filled)
        return
    seen: dict[str, int] = {}
    for position, member in enumerate(filled):
        if entry is KvmMsrEntry:
            path = f"msr[{member.index:#x}]"
        elif entry is KvmCpuidEntry2:
            path = f"cpuid[{member.function:#x},{member.index:#x}]"
        elif entry is KvmCpuidEntry:
            path = f"cpuid[{member.function:#x}]"
        else:
            path = f"entries[{position}]"
        seen[path] = seen.get(path, 0) + 1
        if seen[path] > 1:
            path += f"#{seen[path]}"
        if entry is KvmMsrEntry:
            found[prefix + path] = member.data
            if member.reserved:
                found[f"{prefix}{path}.reserved"] = member.reserved
            continue
        start = len(found)
        _structure(member, f"{prefix}{path}.", names, found)
        if entry is KvmCpuidEntry2 or entry is KvmCpuidEntry:
            # A leaf that is listed and all zero is not one that is missing.
            for name in ("function", "index"):
                found.pop(f"{prefix}{path}.{name}", None)
            if len(found) == start:
                found[f"{prefix}{path}"] = "zeros"

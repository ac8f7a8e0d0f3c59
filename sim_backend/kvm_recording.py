"""Recordings of ioctls on a real /dev/kvm: the file format, and structures by field name.

One JSON object a line; its keys are described in ``tests/golden/kvm/README.md``. Integers of 2^53 and more are written
in hexadecimal, byte strings as ``hex:…``, addresses as ``hva:BUFFER+OFFSET``, descriptors by the id of their object.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeAlias

from sim_backend.vector_file import Record as Record
from sim_backend.vector_file import read_objects

Resolver: TypeAlias = Callable[[str], int]
"""Makes a number of an ``hva:`` address or an object id."""

_CPUID2: Final = struct.Struct("<7I12x")
_CPUID: Final = struct.Struct("<5I4x")
_MSR: Final = struct.Struct("<IIQ")
_ROUTE: Final = struct.Struct("<IIII32s")
_MAX_CPUID_ROOM: Final = 400
_MSR_ROOM: Final = 2048
_WORD_MAPS: Final = frozenset({"regs", "region", "chip"})  # byte areas shown as {offset: 32-bit word}
_WORD_MAP_BYTES: Final = 128
_REQUIRED: Final = {"scenario": str, "req": str, "arg": dict}


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a recording; raise `ReplayFormatError` or ``OSError``."""
    return read_objects(path, _REQUIRED)


def number(value: Any) -> int:
    """Return an integer of a recording, which may be written in hexadecimal."""
    return int(value, 0) if isinstance(value, str) else int(value)


def shown(value: int) -> int | str:
    """Return `value` as a recording writes it."""
    return value if value < 1 << 53 else hex(value)


def byte_string(value: str) -> bytes:
    """Return the bytes of a ``hex:`` string."""
    return bytes.fromhex(value.removeprefix("hex:"))


@dataclass(frozen=True, slots=True)
class Layout:
    """One structure: its size and fields (name, struct-module format, offset)."""

    size: int  # [bytes]
    fields: tuple[tuple[str, str, int], ...]

    def pack(self, values: Mapping[str, Any], resolve: Resolver) -> bytearray:
        """Return the structure with `values` set and zeros elsewhere. Raise ``KeyError`` on an unknown field."""
        image = bytearray(self.size)
        fields = {name: (kind, offset) for name, kind, offset in self.fields}
        for name, value in values.items():
            kind, offset = fields[name]
            if kind.endswith("s"):
                length = int(kind[:-1])
                image[offset : offset + length] = _area(value, length)
            else:
                struct.pack_into(f"<{kind}", image, offset, _wrapped(_resolved(value, resolve), kind))
        return image

    def unpack(self, image: bytes) -> dict[str, Any]:
        """Return every field as a recording shows it."""
        values: dict[str, Any] = {}
        for name, kind, offset in self.fields:
            (value,) = struct.unpack_from(f"<{kind}", image, offset)
            values[name] = _shown_area(value) if isinstance(value, bytes) else shown(value)
        return values


def _area(value: Any, length: int) -> bytes:
    if isinstance(value, str):
        return byte_string(value).ljust(length, b"\0")[:length]
    image = bytearray(length)
    for offset, word in value.items():
        struct.pack_into("<I", image, number(offset), number(word))
    return bytes(image)


def _shown_area(value: bytes) -> Any:
    if len(value) < _WORD_MAP_BYTES:
        return "hex:" + value.rstrip(b"\0").hex()
    words = struct.unpack(f"<{len(value) // 4}I", value)
    return {hex(4 * index): hex(word) for index, word in enumerate(words) if word}


def _resolved(value: Any, resolve: Resolver) -> int:
    if isinstance(value, str) and not value.startswith("0x"):
        return resolve(value)
    return number(value)


def _wrapped(value: int, kind: str) -> int:
    return value & ((1 << 8 * struct.calcsize(f"<{kind}")) - 1)


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What structs.json says of one request."""

    nr: int
    argument: str
    direction: str  # none, R (kernel to user), W (user to kernel), RW


@cache
def _tables() -> tuple[dict[str, RequestInfo], dict[str, Layout]]:
    data = json.loads((files("sim_backend") / "kvm_structs.json").read_text(encoding="ascii"))
    requests = {name: RequestInfo(nr, arg, direction) for name, (nr, arg, direction) in data["requests"].items()}
    structs = {
        name: Layout(size, tuple((field, kind, offset) for field, kind, offset in fields))
        for name, (size, fields) in data["structs"].items()
    }
    return requests, structs


def request_info(name: str) -> RequestInfo | None:
    """Return what is known of the request called `name`."""
    return _tables()[0].get(name)


def layout(name: str) -> Layout:
    """Return the fixed-size structure called `name`; raise ``KeyError``."""
    return _tables()[1][name]


# ---- structures with a list at the end ----------------------------------------------------------------------


def pack_argument(argument: Mapping[str, Any], resolve: Resolver) -> bytearray:
    """Return the memory behind an argument that is a structure, with room for what the kernel writes."""
    name = argument["struct"]
    values = {key: value for key, value in argument.items() if key != "struct"}
    packer = _LISTS.get(name)
    return layout(name).pack(values, resolve) if packer is None else packer(values)


def is_list(name: str) -> bool:
    """Tell whether `name` is a structure with a list, of which a successful query shows everything."""
    return name in _UNPACKERS


def unpack_argument(name: str, image: bytes, before: bytes) -> dict[str, Any]:
    """Return the fields of the structure `name`; a list has as many entries as it claims now, or claimed before."""
    unpacker = _UNPACKERS.get(name)
    return layout(name).unpack(image) if unpacker is None else unpacker(image, before)


def _pack_cpuid2(values: Mapping[str, Any]) -> bytearray:
    entries = [tuple(map(number, entry)) for entry in values.get("entries", [])]
    nent = number(values.get("nent", len(entries)))
    room = max(min(nent, _MAX_CPUID_ROOM), len(entries))
    image = bytearray(8 + room * _CPUID2.size)
    struct.pack_into("<II", image, 0, nent & 0xFFFF_FFFF, number(values.get("padding", 0)))
    for index, entry in enumerate(entries):
        _CPUID2.pack_into(image, 8 + index * _CPUID2.size, *entry)
    return image


def _pack_cpuid(values: Mapping[str, Any]) -> bytearray:
    entries = [tuple(map(number, entry)) for entry in values.get("entries", [])]
    nent = number(values.get("nent", len(entries)))
    image = bytearray(8 + max(min(nent, _MAX_CPUID_ROOM), len(entries)) * _CPUID.size)
    struct.pack_into("<II", image, 0, nent & 0xFFFF_FFFF, 0)
    for index, entry in enumerate(entries):
        _CPUID.pack_into(image, 8 + index * _CPUID.size, *entry)
    return image


def _pack_msrs(values: Mapping[str, Any]) -> bytearray:
    entries = [list(map(number, entry)) for entry in values.get("entries", [])]
    nmsrs = number(values.get("nmsrs", len(entries)))
    image = bytearray(8 + _MSR_ROOM * _MSR.size)
    struct.pack_into("<II", image, 0, nmsrs & 0xFFFF_FFFF, number(values.get("pad", 0)))
    for position, (index, data, *reserved) in enumerate(entries):
        _MSR.pack_into(image, 8 + position * _MSR.size, index, reserved[0] if reserved else 0, data)
    return image


def _pack_msr_list(values: Mapping[str, Any]) -> bytearray:
    image = bytearray(4 + 4 * _MSR_ROOM)
    struct.pack_into("<I", image, 0, number(values.get("nmsrs", 0)))
    return image


def _pack_routing(values: Mapping[str, Any]) -> bytearray:
    entries = values.get("entries", [])
    nr = number(values.get("nr", len(entries)))
    image = bytearray(8 + max(len(entries), min(nr, 4096)) * _ROUTE.size)
    struct.pack_into("<II", image, 0, nr & 0xFFFF_FFFF, number(values.get("flags", 0)))
    for index, entry in enumerate(entries):
        union = _union(entry.get("u", []))
        _ROUTE.pack_into(
            image,
            8 + index * _ROUTE.size,
            number(entry.get("gsi", 0)),
            number(entry.get("type", 0)),
            number(entry.get("flags", 0)),
            number(entry.get("pad", 0)),
            union,
        )
    return image


def _union(value: Any) -> bytes:
    if isinstance(value, str):
        return byte_string(value).ljust(32, b"\0")
    words = list(map(number, value))
    return struct.pack(f"<{len(words)}I", *words).ljust(32, b"\0")


def _pack_signal_mask(values: Mapping[str, Any]) -> bytearray:
    sigset = byte_string(values["sigset"]) if "sigset" in values else bytes(8)
    return bytearray(struct.pack("<I", number(values.get("len", 8))) + sigset.ljust(128, b"\0"))


def _unpack_cpuid2(image: bytes, before: bytes) -> dict[str, Any]:
    (nent,) = struct.unpack_from("<I", image)
    (old,) = struct.unpack_from("<I", before)
    count = min(nent, old, (len(image) - 8) // _CPUID2.size)
    entries = [[hex(word) for word in _CPUID2.unpack_from(image, 8 + index * _CPUID2.size)] for index in range(count)]
    return {"nent": nent, "entries": entries}


def _unpack_msrs(image: bytes, before: bytes) -> dict[str, Any]:
    (nmsrs,) = struct.unpack_from("<I", before)
    entries = []
    for position in range(min(nmsrs, _MSR_ROOM)):
        index, _reserved, data = _MSR.unpack_from(image, 8 + position * _MSR.size)
        entries.append([hex(index), shown(data)])
    return {"entries": entries}


def _unpack_msr_list(image: bytes, before: bytes) -> dict[str, Any]:
    del before
    (nmsrs,) = struct.unpack_from("<I", image)
    indices = struct.unpack_from(f"<{min(nmsrs, _MSR_ROOM)}I", image, 4)
    return {"nmsrs": nmsrs, "indices": [hex(index) for index in indices]}


_LISTS: Final[dict[str, Callable[[Mapping[str, Any]], bytearray]]] = {
    "cpuid2": _pack_cpuid2,
    "cpuid": _pack_cpuid,
    "msrs": _pack_msrs,
    "msr_list": _pack_msr_list,
    "irq_routing": _pack_routing,
    "signal_mask": _pack_signal_mask,
}
_UNPACKERS: Final[dict[str, Callable[[bytes, bytes], dict[str, Any]]]] = {
    "cpuid2": _unpack_cpuid2,
    "msrs": _unpack_msrs,
    "msr_list": _unpack_msr_list,
}

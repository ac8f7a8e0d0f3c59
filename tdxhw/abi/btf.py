"""Structures from a kernel's BTF, which bpftool reads (ADR 8).

A module's BTF is split: it holds only the types that vmlinux has not, and refers to the others by their number.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tdxhw.abi.errors import AbiError
from tdxhw.abi.layout import Enumeration, Field, Layout

_TIME_LIMIT_S: Final = 120
_PLACES: Final = ("/usr/sbin", "/sbin")
"""Where distributions put bpftool, outside a user's PATH."""
_TRANSPARENT: Final = frozenset({"TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"})
_POINTER_BYTES: Final = 8

_Type = dict[str, Any]


class Types:
    """Types by number, those of vmlinux under those of a module."""

    def __init__(self, types: Mapping[int, _Type], base: "Types | None" = None) -> None:
        self._types = types
        self._base = base
        self._by_name: dict[str, list[_Type]] = {}
        self._enumerations: dict[str, list[_Type]] = {}
        kinds = {"STRUCT": self._by_name, "UNION": self._by_name, "ENUM": self._enumerations}
        for one in types.values():
            named = kinds.get(one["kind"])
            if named is not None and one["name"] != "(anon)":
                named.setdefault(one["name"], []).append(one)

    def layouts(self, name: str) -> list[Layout]:
        """Return every different layout that ``struct name`` has here, without those of the base; none if none."""
        found: list[Layout] = []
        for one in self._by_name.get(name, ()):
            try:
                layout = Layout(one["size"], dict(self._members(one, "", 0)))
            except RecursionError:
                raise AbiError(f"BTF is broken: struct {name} contains itself") from None
            if layout not in found:
                found.append(layout)
        return found

    def enumerations(self, name: str) -> list[Enumeration]:
        """Return every different ``enum name`` that is here, without those of the base; none if none."""
        found: list[Enumeration] = []
        for one in self._enumerations.get(name, ()):
            made = Enumeration(one["size"], {value["name"]: value["val"] for value in one["values"]})
            if made not in found:
                found.append(made)
        return found

    def _get(self, number: int) -> _Type:
        found = self._types.get(number)
        if found is not None:
            return found
        if self._base is None:
            raise AbiError(f"BTF refers to type {number}, which is not there: is it of another build than its vmlinux?")
        return self._base._get(number)  # noqa: SLF001 (of this class)

    def _resolved(self, number: int) -> _Type:
        one = self._get(number)
        if one["kind"] in _TRANSPARENT:
            return self._resolved(one["type_id"])
        return one

    def _size(self, one: _Type) -> int:
        match one["kind"]:
            case "PTR":
                return _POINTER_BYTES
            case "ARRAY":
                return int(one["nr_elems"]) * self._size(self._resolved(one["type_id"]))
            case _:
                return int(one.get("size", 0))

    def _members(self, structure: _Type, prefix: str, base: int) -> Iterator[tuple[str, Field]]:
        for member in structure["members"]:
            if member.get("bitfield_size"):
                continue  # uapi structures have none
            kind = self._resolved(member["type_id"])
            offset = base + member["bits_offset"] // 8
            inner = prefix
            if member["name"] != "(anon)":
                yield f"{prefix}{member['name']}", Field(offset, self._size(kind))
                inner = f"{prefix}{member['name']}."
            if kind["kind"] in ("STRUCT", "UNION"):
                yield from self._members(kind, inner, offset)


def read(file: Path, base: Path | None = None, base_types: Types | None = None) -> Types:
    """Read the BTF of `file`, an ELF file with a section .BTF or the bare BTF that a running kernel shows.

    `base` and `base_types` are vmlinux and its types where `file` is a module. Raise `AbiError` when bpftool is
    missing or refuses.
    """
    program = shutil.which("bpftool") or shutil.which("bpftool", path=":".join(_PLACES))
    if program is None:
        raise AbiError("reading BTF needs bpftool: install your distribution's package bpftool (Ubuntu: linux-tools)")
    argv = [program, "--json", *(("--base-btf", str(base)) if base else ()), "btf", "dump", "file", str(file)]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise AbiError(f"{file.name}: bpftool did not end within {_TIME_LIMIT_S} s") from None
    try:
        answer = json.loads(done.stdout)
        types = {one["id"]: one for one in answer["types"]}
    except (ValueError, KeyError, TypeError):
        raise AbiError(f"{file.name}: bpftool cannot read its BTF: {_complaint(done)}") from None
    return Types(types, base_types)


def _complaint(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what bpftool says is wrong: in JSON on stdout, or in words on stderr."""
    try:
        return str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return lines[-1]

"""A kernel's structures against the binding: a real kernel's, as bpftool described them, and changed ones."""

import ctypes
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.abi.binding import KVM, NOT_CHECKED, TDX, Bound
from tdxhw.abi.btf import Types
from tdxhw.abi.compare import Agreement, Compared, compare, dialect_of
from tdxhw.abi.errors import AbiError
from tests.unit.abi.samples import recorded, types_of
from uapi_ctypes import kvm, kvm_run, kvm_state, tdx_mainline, tdx_v17

PARTS = recorded()


def numbered(document: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {one["id"]: one for one in document["types"]}


def kernel_types(parts: dict[str, Any]) -> list[Types]:
    base = Types(numbered(parts["vmlinux"]))
    return [Types(numbered(parts["kvm-intel"]), base), Types(numbered(parts["kvm"]), base), base]


def by_name(compared: list[Compared]) -> dict[str, Compared]:
    return {one.name: one for one in compared}


def structures(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a structure as the parts of the recording have it, to be changed in place."""
    found = [one for part in parts.values() for one in part["types"] if one["kind"] == "STRUCT" and one["name"] == name]
    assert found, name
    return found


def change(parts: dict[str, Any], name: str, field: str, by_bytes: int) -> int:
    """Move a field; return where it was [bytes]."""
    before = set()
    for one in structures(parts, name):
        for member in one["members"]:
            if member["name"] == field:
                before.add(member["bits_offset"] // 8)
                member["bits_offset"] += by_bytes * 8
    (offset,) = before
    return int(offset)


# ---- a real kernel ----


def test_a_real_kernel_speaks_mainline_and_agrees_in_every_structure() -> None:
    types = kernel_types(PARTS)
    assert dialect_of(types) == "mainline"
    compared = compare(types, "mainline")
    assert {one.name: one.differences for one in compared if one.agreement is not Agreement.AGREES} == {}
    assert [one.newer for one in compared if one.newer] == []
    assert by_name(compared)["kvm_tdx_capabilities"].size == 2056
    assert len(compared) > 60


def test_every_structure_of_the_binding_is_checked_or_said_not_to_be() -> None:
    named = {
        found[1]
        for module in (kvm, kvm_run, kvm_state, tdx_mainline, tdx_v17)
        for layout in vars(module).values()
        if isinstance(layout, type)
        and issubclass(layout, (ctypes.Structure, ctypes.Union))
        and (found := re.match(r"``struct (\w+)``", layout.__doc__ or ""))
    }
    checked = {bound.name for group in (TDX, KVM) for bounds in group.values() for bound in bounds}
    assert checked | set(NOT_CHECKED) == named


# ---- one thing changed ----


def test_a_moved_field_is_named_with_both_offsets() -> None:
    parts = recorded()
    change(parts, "kvm_tdx_init_vm", "cpuid", 8)
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_init_vm"]
    # What is inside has moved with it, which is said once.
    assert [str(one) for one in changed.differences] == [
        "kvm_tdx_init_vm.cpuid: offset 264 in the kernel, 256 here",
    ]


FIELDS = [
    (bound.name, field["name"])
    for bound in (*TDX["mainline"], *KVM["mainline"])
    for field in structures(PARTS, bound.name)[0]["members"]
    if field["name"] in bound.layout().fields
]


@given(st.sampled_from(FIELDS), st.integers(1, 64))
def test_any_field_that_moves_is_named_with_its_offset(field: tuple[str, str], by: int) -> None:
    name, path = field
    parts = recorded()
    before = change(parts, name, path, by)
    changed = by_name(compare(kernel_types(parts), "mainline"))[name]
    assert changed.agreement is Agreement.DIFFERS
    assert f"{name}.{path}: offset {before + by} in the kernel, {before} here" in map(str, changed.differences)


def test_a_structure_that_grew_is_named_with_both_sizes() -> None:
    parts = recorded()
    structures(parts, "kvm_tdx_cmd")[0]["size"] += 8
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_cmd"]
    assert [str(one) for one in changed.differences] == ["kvm_tdx_cmd: 32 bytes in the kernel, 24 here"]


def test_a_field_that_is_gone_is_named() -> None:
    parts = recorded()
    (one,) = structures(parts, "kvm_tdx_init_vm")
    one["members"] = [member for member in one["members"] if member["name"] != "xfam"]
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_init_vm"]
    assert [str(one) for one in changed.differences] == [
        "kvm_tdx_init_vm.xfam: not in the kernel; offset 8, 8 bytes here"
    ]


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_new_field_where_there_was_padding_is_a_note_and_no_difference(place: str) -> None:
    """As when Linux 6.16 took the TDVMCALL capabilities from ``kvm_tdx_capabilities.reserved``."""
    parts = recorded()
    (one,) = structures(parts, "kvm_tdx_init_vm")
    members = {member["name"]: member for member in one["members"]}
    padding = members["reserved"]
    (array,) = (each for part in parts.values() for each in part["types"] if each["id"] == padding["type_id"])
    parts["vmlinux"]["types"].append(array | {"id": 10**6, "nr_elems": array["nr_elems"] - 1})
    begin, end = padding["bits_offset"], padding["bits_offset"] + 64 * (array["nr_elems"] - 1)
    padding |= {"type_id": 10**6, "bits_offset": begin + 64 if place == "first" else begin}
    newer = {"name": "newer", "type_id": members["xfam"]["type_id"], "bits_offset": begin if place == "first" else end}
    one["members"].append(newer)
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_init_vm"]
    assert [str(one) for one in changed.differences] == []
    assert [str(one) for one in changed.newer] == [
        f"kvm_tdx_init_vm.newer: offset {newer['bits_offset'] // 8}, 8 bytes in the kernel; not here"
    ]


def test_padding_that_is_all_taken_is_a_note_and_no_difference() -> None:
    parts = recorded()
    (one,) = structures(parts, "kvm_create_guest_memfd")
    (padding,) = (member for member in one["members"] if member["name"] == "reserved")
    padding["name"] = "node"
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_create_guest_memfd"]
    assert changed.agreement is Agreement.AGREES
    assert [str(one) for one in changed.newer] == [
        "kvm_create_guest_memfd.node: offset 16, 48 bytes in the kernel; not here"
    ]


def test_a_flexible_array_that_moved_is_named() -> None:
    parts = recorded()
    change(parts, "kvm_msr_list", "(anon)", 4)  # what its macro wraps around the array
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_msr_list"]
    assert [str(one) for one in changed.differences] == ["kvm_msr_list.indices: offset 8 in the kernel, 4 here"]


def test_a_structure_that_two_parts_describe_differently_differs() -> None:
    parts = recorded()
    other = structures(parts, "kvm_regs")[0] | {"id": 10**6, "size": 8}
    parts["kvm-intel"]["types"].append(other)
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_regs"]
    assert "kvm_regs: 8 bytes in the kernel, 144 here" in map(str, changed.differences)


def commands(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the enumeration of sub-commands, to be changed in place."""
    found: dict[str, Any]
    (found,) = [one for part in parts.values() for one in part["types"] if one["name"] == "kvm_tdx_cmd_id"]
    assert found["kind"] == "ENUM"
    return found


def test_a_sub_command_of_another_number_is_named_with_both() -> None:
    parts = recorded()
    for value in commands(parts)["values"]:
        value["val"] = {3: 4, 4: 3}.get(value["val"], value["val"])
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_cmd_id"]
    assert [str(one) for one in changed.differences] == [
        "kvm_tdx_cmd_id.KVM_TDX_INIT_MEM_REGION: 4 in the kernel, 3 here",
        "kvm_tdx_cmd_id.KVM_TDX_FINALIZE_VM: 3 in the kernel, 4 here",
    ]


def test_a_sub_command_that_is_gone_is_named() -> None:
    parts = recorded()
    del commands(parts)["values"][5]
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_cmd_id"]
    assert [str(one) for one in changed.differences] == ["kvm_tdx_cmd_id.KVM_TDX_GET_CPUID: not in the kernel; 5 here"]


def test_a_sub_command_that_is_newer_than_the_binding_is_a_note_and_no_difference() -> None:
    parts = recorded()
    commands(parts)["values"][6:] = [{"name": "KVM_TDX_NEWER", "val": 6}, {"name": "KVM_TDX_CMD_NR_MAX", "val": 7}]
    changed = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_cmd_id"]
    assert changed.agreement is Agreement.AGREES
    assert [str(one) for one in changed.newer] == ["kvm_tdx_cmd_id.KVM_TDX_NEWER: 6 in the kernel; not here"]


def test_a_structure_that_nobody_describes_is_not_described_and_never_agrees() -> None:
    parts = recorded()
    structures(parts, "kvm_tdx_cmd")[0]["name"] = "kvm_tdx_cmd_renamed"
    compared = by_name(compare(kernel_types(parts), "mainline"))["kvm_tdx_cmd"]
    assert compared.agreement is Agreement.NOT_DESCRIBED


# ---- dialects ----


def bound_types(bounds: tuple[Bound, ...], commands: type[IntEnum] | None = None) -> Types:
    document = types_of({bound.name: bound.structure for bound in bounds})
    if commands is not None:
        values = [{"name": one.name, "val": int(one)} for one in commands]
        document["types"].append({"id": 10**6, "kind": "ENUM", "name": "kvm_tdx_cmd_id", "size": 4, "values": values})
    return Types(numbered(document))


@pytest.mark.parametrize("dialect", TDX)
def test_the_dialect_is_told_by_the_fields(dialect: str) -> None:
    assert dialect_of([bound_types(TDX[dialect])]) == dialect


def test_a_kernel_of_v17_agrees_with_v17_and_not_with_mainline() -> None:
    types = [bound_types(TDX["v17"], tdx_v17.KvmTdxCmdIdV17)]
    own = {one.name: one.agreement for one in compare(types, "v17") if one.of_tdx}
    assert set(own.values()) == {Agreement.AGREES}
    other = by_name(compare(types, "mainline"))["kvm_tdx_capabilities"]
    assert "kvm_tdx_capabilities.supported_attrs: not in the kernel; offset 0, 8 bytes here" in map(
        str, other.differences
    )
    (command,) = by_name(compare(types, "mainline"))["kvm_tdx_cmd_id"].differences
    assert str(command) == "kvm_tdx_cmd_id.KVM_TDX_GET_CPUID: not in the kernel; 5 here"


def test_a_kernel_without_tdx_has_no_dialect_and_is_compared_without_it() -> None:
    parts = recorded()
    for name in (bound.name for bound in TDX["mainline"]):
        structures(parts, name)[0]["name"] = "renamed"
    commands(parts)["name"] = "renamed"
    for part in parts.values():
        for one in part["types"]:
            if one["kind"] == "UNION":  # that of kvm_run
                one["members"] = [member for member in one["members"] if member["name"] != "tdx"]
    types = kernel_types(parts)
    assert dialect_of(types) is None
    compared = compare(types, None)
    assert {one.agreement for one in compared if one.of_tdx} == {Agreement.NOT_DESCRIBED}
    assert {one.agreement for one in compared if not one.of_tdx} == {Agreement.AGREES}


def test_split_btf_of_another_build_is_refused() -> None:
    module = Types({1: {"id": 1, "kind": "STRUCT", "name": "s", "size": 8, "members": [_member(7)]}})
    with pytest.raises(AbiError, match="refers to type 7, which is not there"):
        module.layouts("s")


@pytest.mark.parametrize("inner", ["STRUCT", "TYPEDEF", "ARRAY"])
def test_btf_that_goes_round_in_circles_is_refused(inner: str) -> None:
    types = {
        1: {"id": 1, "kind": "STRUCT", "name": "s", "size": 8, "members": [_member(2)]},
        2: {"id": 2, "kind": inner, "name": "t", "size": 8, "type_id": 2, "nr_elems": 1, "members": [_member(1)]},
    }
    with pytest.raises(AbiError, match="BTF is broken: struct s contains itself"):
        Types(types).layouts("s")


def _member(type_id: int) -> dict[str, Any]:
    return {"name": "field", "type_id": type_id, "bits_offset": 0}


# ---- bpftool itself ----


def test_without_bpftool_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdxhw.abi import btf

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(btf, "_PLACES", ())
    with pytest.raises(AbiError, match="needs bpftool: install"):
        btf.read(tmp_path / "vmlinux")


def test_what_bpftool_complains_of_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdxhw.abi import btf
    from tests.unit.abi.samples import fake_bpftool

    monkeypatch.setenv("PATH", str(fake_bpftool(tmp_path / "bin", {"vmlinux": {"error": "failed to load BTF"}})))
    with pytest.raises(AbiError, match="vmlinux: bpftool cannot read its BTF: failed to load BTF"):
        btf.read(tmp_path / "vmlinux")


def test_without_pahole_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdxhw.abi import dwarf

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AbiError, match="needs pahole: install your distribution's package dwarves"):
        dwarf.read(tmp_path / "vmlinux")

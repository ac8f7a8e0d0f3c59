"""`tdxhw measure`: TDVF metadata, and MRTD by hashing and by building the TD on the model."""

import hashlib
import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.backends.sim import mrtd_on_model
from tdxhw.errors import MeasureError
from tdxhw.measure import Order, mrtd, steps
from tdxhw.tdvf import SectionAttribute, SectionType, parse

Cli = Callable[..., tuple[int, str, str]]
PAGE = 4096
FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
OTHER = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le  # the SEV-ES reset block: stands before it


@dataclass
class Spec:
    """A section to put into an image."""

    type: int
    gpa: int
    size: int
    attributes: int = 0
    data: bytes = b""


def image(sections: list[Spec], *, guid_table: bool = True, version: int = 1, signature: bytes = b"TDVF") -> bytes:
    """Build a TDVF image as a firmware build would lay it out."""
    body = bytearray()
    entries = b""
    for section in sections:
        entries += struct.pack(
            "<IIQQII", len(body), len(section.data), section.gpa, section.size, section.type, section.attributes
        )
        body += section.data
    descriptor = struct.pack("<4sIII", signature, 16 + len(entries), version, len(sections)) + entries
    start = len(body)
    body += descriptor
    if guid_table:
        table_size = 18 + 22 + 18 + 8
        total = start + len(descriptor) + table_size + 32
        table = struct.pack("<QH16s", 0, 26, OTHER) + struct.pack("<IH16s", total - start, 22, METADATA)
        table += struct.pack("<H16s", len(table) + 18, FOOTER)
        return bytes(body) + table + bytes(32)
    total = len(body) + 64
    return bytes(body) + bytes(32) + struct.pack("<I", total - start) + bytes(28)


FIRMWARE = [
    Spec(SectionType.BFV, 0xFFFF_E000, 2 * PAGE, SectionAttribute.MR_EXTEND, b"code" * 2000),
    Spec(SectionType.CFV, 0xFFFF_D000, PAGE, 0, b"variables"),
    Spec(SectionType.TEMP_MEM, 0x81_0000, 2 * PAGE),
    Spec(SectionType.TD_HOB, 0x80_9000, PAGE),
    Spec(SectionType.PERM_MEM, 0x10_0000, 4 * PAGE, SectionAttribute.PAGE_AUG),
]


def reference(sections: list[Spec], order: Order) -> bytes:
    """Compute MRTD in the most literal way: a list of the module's updates, then one hash."""
    stream = b""
    for section in sections:
        if section.attributes & SectionAttribute.PAGE_AUG:
            continue
        contents = section.data.ljust(section.size, b"\0")
        adds, extends = [], []
        for offset in range(0, section.size, PAGE):
            gpa = section.gpa + offset
            adds.append(b"MEM.PAGE.ADD\0\0\0\0" + struct.pack("<Q", gpa) + bytes(104))
            extend = b""
            for chunk in range(0, PAGE, 256):
                extend += b"MR.EXTEND" + bytes(7) + struct.pack("<Q", gpa + chunk) + bytes(104)
                extend += contents[offset + chunk : offset + chunk + 256]
            extends.append(extend if section.attributes & SectionAttribute.MR_EXTEND else b"")
        if order is Order.PAGE_BY_PAGE:
            stream += b"".join(add + extend for add, extend in zip(adds, extends, strict=True))
        else:
            stream += b"".join(adds) + b"".join(extends)
    return hashlib.sha384(stream).digest()


@pytest.mark.parametrize("guid_table", [True, False], ids=["GUIDed table", "offset at the end"])
def test_finds_the_metadata_in_both_places(guid_table: bool) -> None:
    sections = parse(image(FIRMWARE, guid_table=guid_table))

    assert [(s.type, s.gpa, s.size) for s in sections] == [(f.type, f.gpa, f.size) for f in FIRMWARE]
    assert sections[0].page(1).startswith((b"code" * 2000)[PAGE:])


@pytest.mark.parametrize("order", Order)
def test_hashing_agrees_with_a_literal_reading_of_the_spec(order: Order) -> None:
    assert mrtd(parse(image(FIRMWARE)), order) == reference(FIRMWARE, order)


def test_the_order_changes_the_measurement() -> None:
    sections = parse(image(FIRMWARE))

    assert mrtd(sections, Order.PAGE_BY_PAGE) != mrtd(sections, Order.ADD_THEN_EXTEND)


@pytest.mark.parametrize("order", Order)
def test_the_model_measures_what_hashing_predicts(order: Order) -> None:
    sections = parse(image(FIRMWARE))

    assert mrtd_on_model(steps(sections, order), 7, "1.5.01") == mrtd(sections, order)


section_lists = st.lists(
    st.builds(
        lambda kind, pages, attributes, data: (kind, pages, attributes, data),
        st.sampled_from(list(SectionType)),
        st.integers(1, 3),
        st.sampled_from([0, 1, 2]),
        st.binary(max_size=300),
    ),
    min_size=1,
    max_size=5,
)


@given(section_lists)
def test_any_image_is_read_back_as_it_was_built(drawn: list[tuple[SectionType, int, int, bytes]]) -> None:
    specs = [
        Spec(kind, (1 + number) << 20, pages * PAGE, attributes, data)
        for number, (kind, pages, attributes, data) in enumerate(drawn)
    ]

    sections = parse(image(specs))

    assert [(s.gpa, s.size, int(s.attributes), s.data) for s in sections] == [
        (spec.gpa, spec.size, spec.attributes, spec.data) for spec in specs
    ]
    assert mrtd(sections) == reference(specs, Order.PAGE_BY_PAGE)


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_never_crashes(garbage: bytes) -> None:
    with pytest.raises(MeasureError):
        parse(garbage)


@given(st.data())
def test_a_damaged_image_is_read_or_refused(data: st.DataObject) -> None:
    good = bytearray(image(FIRMWARE))
    position = data.draw(st.integers(len(good) - 400, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))

    try:
        sections = parse(bytes(good))
    except MeasureError:
        return
    assert all(not section.gpa % PAGE for section in sections)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        pytest.param(b"", "only 0 bytes", id="empty"),
        pytest.param(bytes(10_000), "neither a GUIDed table nor", id="zeros"),
        pytest.param(image(FIRMWARE, signature=b"XXXX"), "not b'XXXX'", id="signature"),
        pytest.param(image(FIRMWARE, version=2), "version 2", id="version"),
        pytest.param(image([]), "0 sections", id="no sections"),
        pytest.param(image([Spec(9, 0, PAGE)]), "unknown type 9", id="type"),
        pytest.param(image([Spec(0, 0, PAGE, 8)]), "unknown attributes 0x8", id="attributes"),
        pytest.param(image([Spec(0, 0x800, PAGE)]), "no whole pages", id="unaligned"),
        pytest.param(image([Spec(0, 0, PAGE, 0, bytes(5000))]), "bytes of data for", id="too much data"),
        pytest.param(image([Spec(0, 0, 2 * PAGE), Spec(1, PAGE, PAGE)]), "overlap at GPA 0x1000", id="overlap"),
        pytest.param(image(FIRMWARE)[3000:], "truncated image?", id="cut off in front"),
    ],
)
def test_says_why_it_is_no_tdvf_image(tdxhw: Cli, tmp_path: Path, bad: bytes, said: str) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(bad)

    code, out, err = tdxhw("measure", str(path))

    assert code == 2
    assert not out
    assert err.startswith(f"tdxhw: {path}: ")
    assert said in err


def test_prints_mrtd_last_and_what_was_measured(tdxhw: Cli, tmp_path: Path) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(image(FIRMWARE))

    code, out, _ = tdxhw("measure", str(path))

    lines = out.splitlines()
    assert code == 0
    assert lines[-1].split() == ["MRTD", reference(FIRMWARE, Order.PAGE_BY_PAGE).hex()]
    assert lines[0].startswith("BFV")
    assert "added, measured" in lines[0]
    assert "checked        built on the model of TDX module 1.5.01" in lines


def test_json_has_mrtd_order_and_sections(tdxhw: Cli, tmp_path: Path) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(image(FIRMWARE))

    _, out, _ = tdxhw("measure", "--json", "--no-model", "--order", "add-then-extend", str(path))

    document = json.loads(out)
    assert document["mrtd"] == reference(FIRMWARE, Order.ADD_THEN_EXTEND).hex()
    assert document["checked"] == "no"
    assert [section["type"] for section in document["sections"]] == [SectionType(f.type).name for f in FIRMWARE]


def test_an_unknown_module_is_one_line(tdxhw: Cli, tmp_path: Path) -> None:
    path = tmp_path / "firmware.fd"
    path.write_bytes(image(FIRMWARE))

    code, _, err = tdxhw("measure", "--module", "9.9", str(path))

    assert code == 2
    assert err == "tdxhw: no TDX module '9.9'; there are: 1.5.01, mainline-host\n"

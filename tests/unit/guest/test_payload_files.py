"""The committed builds: complete, unharmed, and what their sources build."""

import json
import shutil
from pathlib import Path

import pytest

from tdxhw.guest import build, layout
from tdxhw.guest.payload import PAYLOAD_DIRECTORY, Payload, PayloadError, load, names


def test_every_source_has_a_build_and_every_build_a_source() -> None:
    assert names() == build.source_names()
    assert "td_lifecycle" in names()


@pytest.mark.parametrize("name", names())
def test_a_build_is_of_its_source(name: str) -> None:
    description = json.loads((PAYLOAD_DIRECTORY / f"{name}.json").read_text())
    assert description["source_sha256"] == build.source_sha256(PAYLOAD_DIRECTORY / f"{name}.S")


@pytest.mark.skipif(bool(build.missing_tools()), reason="binutils is not installed: the builds cannot be repeated")
@pytest.mark.parametrize("name", names())
def test_a_rebuild_gives_the_same_bytes(name: str) -> None:
    assert build.differences(name) == []


@pytest.mark.parametrize("name", names())
def test_an_image_ends_at_4_gib_with_the_reset_vector(name: str) -> None:
    payload = load(name)
    assert payload.gpa + len(payload.image) == 1 << 32
    assert payload.symbols["reset_vector"] == payload.entry == layout.RESET_VECTOR
    assert payload.symbols["guest_main"] == layout.CODE_GPA
    assert payload.symbols["parameters"] == layout.PARAMETERS_GPA


def copy(name: str, directory: Path) -> None:
    for suffix in (".bin", ".json"):
        shutil.copy(PAYLOAD_DIRECTORY / f"{name}{suffix}", directory)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    copy("td_lifecycle", tmp_path)
    image = tmp_path / "td_lifecycle.bin"
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(PayloadError, match=r"td_lifecycle\.bin is 65535 bytes, not 65536"):
        Payload.load("td_lifecycle", tmp_path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    copy("td_lifecycle", tmp_path)
    image = tmp_path / "td_lifecycle.bin"
    data = bytearray(image.read_bytes())
    data[0xA000] ^= 1
    image.write_bytes(data)
    with pytest.raises(PayloadError, match=r"is not what td_lifecycle\.json describes"):
        Payload.load("td_lifecycle", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"symbols": 3}', '{"symbols": {"a": "x"}}'])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    copy("td_lifecycle", tmp_path)
    (tmp_path / "td_lifecycle.json").write_text(text)
    with pytest.raises(PayloadError, match="payload td_lifecycle: "):
        Payload.load("td_lifecycle", tmp_path)


def test_an_unknown_payload_names_those_that_exist() -> None:
    with pytest.raises(PayloadError, match=r"no payload named 'nonsense'; there are: .*td_lifecycle"):
        load("nonsense")


def test_parameters_land_on_the_parameter_page() -> None:
    payload = load("accept_page").with_parameters(b"\x12\x34")
    offset = layout.PARAMETERS_GPA - payload.gpa
    assert payload.image[offset : offset + 4] == b"\x12\x34\0\0"
    with pytest.raises(PayloadError, match="4097 bytes do not fit"):
        payload.with_parameters(bytes(4097))
    with pytest.raises(PayloadError, match="outside the image"):
        payload.patched(0x1000, b"x")


def test_check_reports_a_stale_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PAYLOAD_DIRECTORY", tmp_path)
    monkeypatch.setattr(build, "missing_tools", lambda: ["as"])
    (tmp_path / "x.S").write_text("")
    assert build.main(["x"]) == 2

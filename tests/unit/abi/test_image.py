"""Kernel images: what they are, what they say, and that broken ones are refused by name."""

import contextlib
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.abi.errors import AbiError
from tdxhw.abi.image import parse_image, read_image
from tdxhw.abi.notes import build_id
from tests.unit.abi.samples import BUILD_ID, CONFIG, NOTES, PACKERS, RELEASE, bzimage, elf, note, vmlinux


@pytest.mark.parametrize("packing", ["gz", "xz", "bz2", "zst"])
def test_a_bzimage_says_release_build_id_and_configuration(packing: str) -> None:
    image = parse_image(bzimage(vmlinux(config=CONFIG), packing), "vmlinuz")
    assert (image.release, image.build_id, image.config) == (RELEASE, BUILD_ID.hex(), CONFIG)
    assert image.vmlinux == vmlinux(config=CONFIG)


def test_a_vmlinux_says_the_same() -> None:
    image = parse_image(vmlinux(config=CONFIG), "vmlinux")
    assert (image.release, image.build_id, image.config) == (RELEASE, BUILD_ID.hex(), CONFIG)


def test_without_configuration_and_build_id_it_says_nothing_rather_than_something() -> None:
    image = parse_image(elf({".rodata": b"Linux version 6.1 (x)"}), "vmlinux")
    assert (image.release, image.build_id, image.config) == ("6.1", "", "")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"#!/bin/sh\n" * 100, "neither a bzImage nor a vmlinux"),
        (elf({".text": b"no kernel"}), "an ELF file, but no kernel"),
        (vmlinux(machine=183), "a kernel for EM_AARCH64, not for x86-64"),
        (bzimage(b"no ELF file"), "payload is no vmlinux"),
        (bzimage(vmlinux())[:-9], "cut short"),
        (bzimage(vmlinux(), release=""), "does not say which release"),
    ],
)
def test_refuses(data: bytes, complaint: str) -> None:
    with pytest.raises(AbiError, match=complaint):
        parse_image(data, "vmlinuz")


def test_refuses_a_compression_by_its_name() -> None:
    packed = bzimage(vmlinux(), "zst").replace(b"\x28\xb5\x2f\xfd", b"\x89LZO")
    with pytest.raises(AbiError, match=r"vmlinuz: compressed with lzo, which is not read here.*extract-vmlinux"):
        parse_image(packed, "vmlinuz")


LZ4 = f"""#!{sys.executable}
import sys, zlib
packed = sys.stdin.buffer.read()
unpacker = zlib.decompressobj()
sys.stdout.buffer.write(unpacker.decompress(packed[4:]))
if not unpacker.eof or unpacker.unused_data:  # as the real one: what is behind a stream has to be another
    sys.exit("Error 53 : Read error : cannot access compressed block !")
"""


def test_lz4_unpacks_what_the_kernels_build_packed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKERS, "lz4", lambda data: b"\x02\x21\x4c\x18" + zlib.compress(data))
    packed = bzimage(vmlinux(config=CONFIG), "lz4")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AbiError, match="vmlinuz: compressed with lz4: install your distribution's package lz4"):
        parse_image(packed, "vmlinuz")

    (tmp_path / "lz4").write_text(LZ4)
    (tmp_path / "lz4").chmod(0o755)
    assert parse_image(packed, "vmlinuz").config == CONFIG
    damaged = packed[:-9] + bytes([packed[-9] ^ 1]) + packed[-8:]
    with pytest.raises(AbiError, match="vmlinuz: its lz4 data is broken: "):
        parse_image(damaged, "vmlinuz")


def test_a_release_is_what_uname_can_say() -> None:
    """A package from elsewhere must not write into the terminal of who looks at it."""
    with pytest.raises(AbiError, match="no kernel: it has no banner"):
        parse_image(vmlinux("7.2\x1b[31m"), "vmlinux")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AbiError, match="vmlinuz: No such file"):
        read_image(tmp_path / "vmlinuz")


IMAGES = [bzimage(vmlinux(config=CONFIG), packing) for packing in ("gz", "xz", "zst")] + [vmlinux(config=CONFIG)]


@given(st.sampled_from(IMAGES), st.data())
def test_a_cut_image_is_refused_in_one_line(image: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(image) - 1))
    with pytest.raises(AbiError) as error:
        parse_image(image[:length], "vmlinuz")
    assert "\n" not in str(error.value)


@given(st.sampled_from(IMAGES), st.data())
def test_a_damaged_image_is_read_or_refused_and_nothing_else(image: bytes, data: st.DataObject) -> None:
    damaged = bytearray(image)
    for at in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(AbiError):
        assert len(parse_image(bytes(damaged), "vmlinuz").vmlinux) == len(vmlinux(config=CONFIG))


def test_the_running_kernels_notes_have_the_same_build_id(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_bytes(NOTES)
    assert build_id(notes) == BUILD_ID.hex()


def test_notes_without_a_build_id_have_none(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_bytes(note(b"Xen\0", 3, b"not it"))
    assert build_id(notes) == ""
    assert build_id(tmp_path / "none") == ""


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, 1 << 40])
@pytest.mark.parametrize("size", [64, 1 << 62])
def test_a_section_that_is_nowhere_is_refused(offset: int, size: int) -> None:
    image = bytearray(elf({".notes": NOTES, ".rodata": b"Linux version 6.1 (x)"}))
    table = struct.unpack_from("<Q", image, 0x28)[0]
    struct.pack_into("<QQ", image, table + 64 + 0x18, offset, size)  # of the first section, .notes
    with pytest.raises(AbiError, match="vmlinux: an ELF file that is cut short or broken"):
        parse_image(bytes(image), "vmlinux")

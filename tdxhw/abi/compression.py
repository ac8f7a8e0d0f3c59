"""Decompress what a kernel build compresses: images, modules, packages."""

import bz2
import gzip
import lzma
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import IO, Final, cast

from tdxhw.abi.errors import AbiError

MAGICS: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x5d\x00\x00": "lzma",
    b"\x02\x21\x4c\x18": "lz4",  # its legacy format, which the kernel's build uses
    b"\x04\x22\x4d\x18": "lz4",
    b"\x89LZO": "lzo",
}
_BROKEN: Final = (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError)


def kind_of(head: bytes) -> str:
    """Return which compression `head` begins with, nothing for none that we know."""
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), "")


def decompress(data: bytes, what: str) -> bytes:
    """Decompress the first stream in `data` and ignore what is behind it, as a kernel image has its size there.

    Raise `AbiError`, naming `what`, when it is broken, cut short or of a kind that cannot be read here.
    """
    kind = kind_of(data)
    try:
        match kind:
            case "gzip":
                stream = zlib.decompressobj(wbits=31)
                return _whole(stream.decompress(data), stream.eof, what)
            case "xz" | "lzma":
                unpacker = lzma.LZMADecompressor()
                return _whole(unpacker.decompress(data), unpacker.eof, what)
            case "bzip2":
                reader = bz2.BZ2Decompressor()
                return _whole(reader.decompress(data), reader.eof, what)
            case "zstd":
                return _zstd(data, what)
            case "lz4":
                return _by_program(["lz4", "-dc"], data, what)
    except _BROKEN as error:
        raise AbiError(f"{what}: its {kind} data is broken: {error}") from None
    if kind:
        raise AbiError(
            f"{what}: compressed with {kind}, which is not read here: unpack it first (scripts/extract-vmlinux of the "
            "kernel's source does that with an image) and give the vmlinux"
        )
    raise AbiError(f"{what}: not compressed in a way that is known here")


def _whole(data: bytes, complete: bool, what: str) -> bytes:
    if not complete:
        raise AbiError(f"{what}: cut short in the middle of its compressed data")
    return data


def _by_program(argv: list[str], data: bytes, what: str) -> bytes:
    program = shutil.which(argv[0])
    if program is None:
        raise AbiError(f"{what}: compressed with {argv[0]}: install your distribution's package {argv[0]}")
    done = subprocess.run([program, *argv[1:]], input=data, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise AbiError(f"{what}: its {argv[0]} data is broken: {said[-1]}")
    return done.stdout


def _zstd(data: bytes, what: str) -> bytes:
    zstd = _zstd_module(what)
    stream = zstd.ZstdDecompressor()
    try:
        return _whole(stream.decompress(data), stream.eof, what)
    except zstd.ZstdError as error:
        raise AbiError(f"{what}: its zstd data is broken: {error}") from None


def _zstd_module(what: str) -> ModuleType:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise AbiError(f"{what}: compressed with zstd: pip install 'tdxhw[validate]'") from None
    return zstd


def errors_of_broken_data() -> tuple[type[Exception], ...]:
    """Return what reading from `open_stream` may raise on broken or cut data."""
    try:
        return (*_BROKEN, _zstd_module("").ZstdError)
    except AbiError:
        return _BROKEN


def open_stream(stream: IO[bytes], name: str) -> IO[bytes]:
    """Return a reader of what is compressed in `stream`, by the ending of `name`. Raise `AbiError` on another one."""
    match Path(name).suffix:
        case ".gz":
            return cast("IO[bytes]", gzip.open(stream))
        case ".xz" | ".lzma":
            return lzma.open(stream)
        case ".bz2":
            return bz2.open(stream)
        case ".zst":
            opened: IO[bytes] = _zstd_module(name).open(stream)
            return opened
        case ".tar":
            return stream
    raise AbiError(f"{name}: not compressed in a way that is known here")

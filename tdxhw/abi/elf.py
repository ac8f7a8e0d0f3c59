"""Sections and notes of ELF files, which pyelftools reads (ADR 8)."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from tdxhw.abi.errors import AbiError

MAGIC: Final = b"\x7fELF"
_FAILS_IN: Final = (
    struct.error, ValueError, LookupError, TypeError, AssertionError, AttributeError, OverflowError, MemoryError,
    OSError,
)  # fmt: skip
"""What pyelftools runs into on broken files, beside its own errors."""


@contextmanager
def _opened(stream: IO[bytes], name: str) -> Iterator[Any]:
    """Open an ELF file; turn what pyelftools raises on a broken one into `AbiError`."""
    try:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise AbiError("reading a kernel's files needs pyelftools: pip install 'tdxhw[validate]'") from None
    try:
        yield ELFFile(stream)
    except (ELFError, ConstructError, *_FAILS_IN) as error:
        said = str(error) or type(error).__name__
        raise AbiError(f"{name}: an ELF file that is cut short or broken ({said})") from None


def section(path: Path, name: str, called: str) -> bytes | None:
    """Return the contents of a section, None when the file has none of that name. Errors call the file `called`."""
    with path.open("rb") as stream, _opened(stream, called) as elf:
        found = elf.get_section_by_name(name)
        return None if found is None or found["sh_type"] == "SHT_NOBITS" else bytes(found.data())


def has_section(path: Path, name: str) -> bool:
    """Whether the file is an ELF file that has the section, and not emptied of it (``objcopy --only-keep-debug``)."""
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            return False
        stream.seek(0)
        with _opened(stream, path.name) as elf:
            found = elf.get_section_by_name(name)
            return found is not None and found["sh_type"] != "SHT_NOBITS"


def kernel_build_id(stream: IO[bytes], name: str) -> str:
    """Return the GNU build id of a vmlinux, nothing if it has none. Raise `AbiError` when it is not for x86-64."""
    with _opened(stream, name) as elf:
        machine = elf.header["e_machine"]
        if machine != "EM_X86_64":
            raise AbiError(f"{name}: a kernel for {machine}, not for x86-64")
        notes = elf.get_section_by_name(".notes")
        for note in notes.iter_notes() if notes is not None else ():
            if note["n_name"] == "GNU" and note["n_type"] == "NT_GNU_BUILD_ID":
                return str(note["n_desc"])
        return ""

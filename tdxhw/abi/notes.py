"""The notes of the running kernel. Standard library only, and little of that: lab hosts read them for every run."""

import struct
from pathlib import Path
from typing import Final

_NOTE: Final = struct.Struct("<III")  # length of name, length of contents, type
_NT_GNU_BUILD_ID: Final = 3


def build_id(notes: Path) -> str:
    """Return the GNU build id from a file of ELF notes (``/sys/kernel/notes``); nothing where there is none."""
    try:
        data = notes.read_bytes()
    except OSError:
        return ""
    offset = 0
    while offset + _NOTE.size <= len(data):
        name_length, length, kind = _NOTE.unpack_from(data, offset)
        name_at = offset + _NOTE.size
        contents_at = name_at + (name_length + 3 & ~3)
        if data[name_at : name_at + name_length] == b"GNU\0" and kind == _NT_GNU_BUILD_ID:
            return data[contents_at : contents_at + length].hex()
        offset = contents_at + (length + 3 & ~3)
    return ""

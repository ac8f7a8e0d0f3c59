"""MRTD: the SHA-384 over what TDH.MEM.PAGE.ADD and TDH.MR.EXTEND did, in the order in which they did it.

A page contributes one 128-byte block with its GPA; its contents count only where MR.EXTEND measures them, 256 bytes
at a time: a block with the GPA of the chunk, and the chunk. Source: TDX Module 1.5 ABI Reference, "MRTD".
"""

import hashlib
from struct import Struct
from typing import Final

CHUNK_BYTES: Final = 256
_CHUNKS: Final = 4096 // CHUNK_BYTES
_LONG_BYTES: Final = 32768
_PAGE: Final = Struct("256s" * _CHUNKS)
_EXTENSIONS: Final = Struct("<" + "16sQ104x256s" * _CHUNKS)
_ADDED_PAGE: Final = Struct("<16sQ104x" + "16sQ104x256s" * _CHUNKS)
_BLOCK: Final = Struct("<16sQ104x")


def add_block(gpa: int) -> bytes:
    """Return what TDH.MEM.PAGE.ADD of the page at `gpa` contributes [128 bytes]."""
    return _BLOCK.pack(b"MEM.PAGE.ADD", gpa)


def extend_block(gpa: int) -> bytes:
    """Return what TDH.MR.EXTEND of the chunk at `gpa` contributes before the chunk itself [128 bytes]."""
    return _BLOCK.pack(b"MR.EXTEND", gpa)


class Measurement:
    """The SHA-384 in the making. Small contributions are collected, so that the hash runs over long pieces."""

    __slots__ = ("_hash", "_pending")

    def __init__(self) -> None:
        self._hash = hashlib.sha384()
        self._pending = bytearray()

    def extend(self, data: bytes | memoryview) -> None:
        """Append a contribution."""
        self._pending += data
        if len(self._pending) > _LONG_BYTES:
            self._hash.update(self._pending)
            self._pending.clear()

    def digest(self) -> bytes:
        """Return MRTD as it would be if the TD were finalized now [48 bytes]."""
        self._hash.update(self._pending)
        self._pending.clear()
        return self._hash.digest()


class PageExtender:
    """Builds what TDH.MR.EXTEND of all chunks of one page contributes, in one piece for one hash update."""

    __slots__ = ("_fields",)

    def __init__(self) -> None:
        self._fields: list[bytes | int] = [b"MR.EXTEND", 0, b""] * _CHUNKS

    def blocks(self, gpa: int, page: bytes | memoryview) -> bytes:
        """Return the contribution of the page at `gpa` [4 KiB-aligned] with the contents `page` [4096 bytes]."""
        fields = self._fields
        fields[1::3] = range(gpa, gpa + 4096, CHUNK_BYTES)
        fields[2::3] = _PAGE.unpack(page)
        return _EXTENSIONS.pack(*fields)

    def added_page(self, gpa: int, page: bytes | memoryview) -> bytes:
        """Return the contribution of TDH.MEM.PAGE.ADD of the page, and of the extensions after it."""
        fields = self._fields
        fields[1::3] = range(gpa, gpa + 4096, CHUNK_BYTES)
        fields[2::3] = _PAGE.unpack(page)
        return _ADDED_PAGE.pack(b"MEM.PAGE.ADD", gpa, *fields)

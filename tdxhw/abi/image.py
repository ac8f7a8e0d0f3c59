"""A kernel image: a bzImage, or the vmlinux that is in it. Its release, build id and configuration.

Sources: Documentation/arch/x86/boot.rst for the bzImage's header; kernel/configs.c for the configuration in an image.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxhw.abi.compression import decompress, kind_of
from tdxhw.abi.elf import MAGIC, kernel_build_id
from tdxhw.abi.errors import AbiError

_BOOT_FLAG: Final = struct.Struct("<H")  # at 0x1fe: 0xaa55
_HEADER: Final = struct.Struct("<4sH")  # at 0x202: "HdrS", version of the boot protocol
_PAYLOAD: Final = struct.Struct("<II")  # at 0x248, protocol 2.08 and later: offset and length of the compressed vmlinux
_VERSION_POINTER: Final = 0x20E  # from 0x200
_BANNER: Final = re.compile(rb"Linux version ([!-~]+) ")
_CONFIG: Final = re.compile(rb"IKCFG_ST(\x1f\x8b.*?)IKCFG_ED", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KernelImage:
    """What a kernel image says of itself."""

    release: str  # what `uname -r` will say
    build_id: str
    """GNU build id, as in ``/sys/kernel/notes``; nothing if the image was linked without."""
    config: str
    """The configuration in it (CONFIG_IKCONFIG), nothing if there is none."""
    vmlinux: bytes
    """The ELF file, decompressed; without DWARF if it comes from a bzImage."""


def read_image(path: Path) -> KernelImage:
    """Read a bzImage or a vmlinux. Raise `AbiError` when it is neither, of another machine, or cut short."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AbiError(f"{path}: {error.strerror}") from None
    return parse_image(data, str(path))


def parse_image(data: bytes, name: str) -> KernelImage:
    """Parse the bytes of a bzImage or a vmlinux; errors name it `name`."""
    if is_bzimage(data):
        release = _header_release(data, name)
        vmlinux = _payload(data, name)
        if not vmlinux.startswith(MAGIC):
            raise AbiError(f"{name}: a bzImage whose payload is no vmlinux")
    elif data.startswith(MAGIC):
        vmlinux = data
        banner = _BANNER.search(data)
        if banner is None:
            raise AbiError(f"{name}: an ELF file, but no kernel: it has no banner 'Linux version …'")
        release = banner[1].decode("ascii", "replace")
    else:
        raise AbiError(f"{name}: neither a bzImage nor a vmlinux")
    return KernelImage(release, kernel_build_id(io.BytesIO(vmlinux), name), _configuration(vmlinux, name), vmlinux)


def is_bzimage(data: bytes) -> bool:
    """Whether it begins as a kernel image for an x86 boot loader."""
    return len(data) > 0x250 and _BOOT_FLAG.unpack_from(data, 0x1FE)[0] == 0xAA55 and data[0x202:0x206] == b"HdrS"


def _header_release(data: bytes, name: str) -> str:
    start = 0x200 + _BOOT_FLAG.unpack_from(data, _VERSION_POINTER)[0]
    text = data[start : start + 256].split(b"\0")[0].decode("ascii", "replace")
    if not text:
        raise AbiError(f"{name}: a bzImage that does not say which release it is")
    return text.split()[0]


def _payload(data: bytes, name: str) -> bytes:
    if _HEADER.unpack_from(data, 0x202)[1] < 0x208:
        raise AbiError(f"{name}: a bzImage of a boot protocol before 2.08: too old to have KVM with TDX")
    offset, length = _PAYLOAD.unpack_from(data, 0x248)
    sectors = data[0x1F1] or 4
    start = (sectors + 1) * 512 + offset
    payload = data[start : start + length]
    if len(payload) != length:
        raise AbiError(f"{name}: cut short: {len(data)} bytes, its header says {start + length}")
    # The build appends the length. Only lz4 takes that for a further block and complains.
    return decompress(payload[:-4] if kind_of(payload) == "lz4" else payload, name)


def _configuration(vmlinux: bytes, name: str) -> str:
    found = _CONFIG.search(vmlinux)
    if found is None:
        return ""
    try:
        return zlib.decompress(found[1], wbits=31).decode("utf-8", "replace")
    except zlib.error as error:
        raise AbiError(f"{name}: the configuration in it is broken: {error}") from None

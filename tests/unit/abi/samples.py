"""Kernels in miniature: ELF files, bzImages, Debian packages and type information, made here byte by byte."""

import bz2
import copy
import ctypes
import gzip
import io
import json
import lzma
import os
import struct
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROOT = Path(__file__).parents[3]
RECORDING = ROOT / "tests" / "golden" / "abi" / "kernel-types.json.gz"
RELEASE = "7.2.13-sample"
BUILD_ID = bytes(range(20))
CONFIG = """\
CONFIG_CPU_SUP_INTEL=y
CONFIG_X86_X2APIC=y
CONFIG_X86_MCE=y
CONFIG_CONTIG_ALLOC=y
CONFIG_KVM_INTEL=m
CONFIG_INTEL_TDX_HOST=y
CONFIG_KVM_INTEL_TDX=y
CONFIG_KVM_GUEST_MEMFD=y
CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES=y
CONFIG_HAVE_KVM_ARCH_GMEM_POPULATE=y
"""
PACKERS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd.compress,
}


# ---- ELF ----


def elf(sections: Mapping[str, bytes], machine: int = 62) -> bytes:
    """Return a 64-bit ELF file with these sections and nothing else."""
    names = b"\0"
    body = b""
    headers = [bytes(64)]
    for name, content in [*sections.items(), (".shstrtab", b"")]:
        name_at = len(names)
        names += name.encode() + b"\0"
        content = names if name == ".shstrtab" else content
        kind = 7 if name == ".notes" else 3 if name == ".shstrtab" else 1
        headers.append(struct.pack("<IIQQQQIIQQ", name_at, kind, 0, 0, 64 + len(body), len(content), 0, 0, 4, 0))
        body += content + bytes(-len(content) % 8)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 1, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(headers), len(headers) - 1
    )
    return header + body + b"".join(headers)


def note(name: bytes, kind: int, content: bytes) -> bytes:
    """Return an ELF note."""
    padded = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(content), kind) + padded + content + bytes(-len(content) % 4)


NOTES = note(b"Xen\0", 8, b"generic\0") + note(b"GNU\0", 3, BUILD_ID)


def vmlinux(release: str = RELEASE, config: str = "", machine: int = 62, **sections: bytes) -> bytes:
    """Return a vmlinux with a banner, a build id, a section .BTF, and the configuration if there is one."""
    inside = b"IKCFG_ST" + gzip.compress(config.encode(), mtime=0) + b"IKCFG_ED" if config else b""
    banner = f"Linux version {release} (someone@somewhere) #1 SMP\n".encode()
    return elf({".rodata": banner + inside, ".notes": NOTES, ".BTF": b"", **sections}, machine)


def bzimage(payload: bytes, packing: str = "gz", release: str = RELEASE) -> bytes:
    """Return a bzImage around `payload`."""
    packed = PACKERS[packing](payload) + struct.pack("<I", len(payload))  # as the kernel's build adds it
    setup_sectors = 2
    image = bytearray((setup_sectors + 1) * 512)
    image[0x1F1] = setup_sectors
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    struct.pack_into("<4sH", image, 0x202, b"HdrS", 0x20F)
    struct.pack_into("<H", image, 0x20E, 0x300)
    struct.pack_into("<II", image, 0x248, 16, len(packed))
    text = f"{release} (someone@somewhere) #1".encode() if release else b""
    image[0x500 : 0x500 + len(text)] = text
    return bytes(image) + bytes(16) + packed


def module(release: str = RELEASE, parameters: Mapping[str, str] | None = None, **sections: bytes) -> bytes:
    """Return a module that says for which kernel it is and which parameters it has."""
    said = [f"parmtype={name}:{kind}" for name, kind in (parameters or {}).items()]
    modinfo = "\0".join([*said, f"vermagic={release} SMP preempt mod_unload ", ""]).encode()
    return elf({".modinfo": modinfo, ".BTF": b"", **sections})


def kvm_intel() -> bytes:
    """Return a kvm-intel.ko with TDX."""
    return module(parameters={"ept": "bool", "tdx": "bool"})


# ---- Debian packages ----


def deb(files: Mapping[str, bytes], packing: str = "xz", depends: str = "libc6") -> bytes:
    """Return a Debian package with these files."""
    control = _tar({"./control": f"Package: sample\nDepends: {depends}\n".encode()})
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(control),
        f"data.tar.{packing}": PACKERS[packing](_tar({f"./{name}": data for name, data in files.items()})),
    }
    archive = b"!<arch>\n"
    for name, content in parts.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive


def _tar(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def classic_package(config: str = CONFIG) -> dict[str, bytes]:
    """Return the files of a linux-image package as it was up to Debian 7.2, and as `make bindeb-pkg` makes it."""
    lib = f"usr/lib/modules/{RELEASE}"
    return {
        f"boot/vmlinuz-{RELEASE}": bzimage(vmlinux()),
        f"boot/config-{RELEASE}": config.encode(),
        f"{lib}/kernel/arch/x86/kvm/kvm-intel.ko.xz": lzma.compress(kvm_intel()),
        f"{lib}/kernel/arch/x86/kvm/kvm.ko.xz": lzma.compress(module()),
        f"{lib}/kernel/fs/ext4/ext4.ko.xz": b"not wanted",
    }


# ---- types ----


def recorded() -> dict[str, Any]:
    """Return bpftool's answers for a real kernel 7.2 with TDX, by part; a copy that may be changed."""
    document = json.loads(gzip.decompress(RECORDING.read_bytes()))
    parts: dict[str, Any] = copy.deepcopy(document["parts"])
    return parts


def types_of(structures: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Return what bpftool would say of a kernel that has the binding's own structures."""
    types: list[dict[str, Any]] = []

    def number(kind: Any, name: str) -> int:
        made: dict[str, Any] = {"id": len(types) + 1, "name": name}
        types.append(made)
        if isinstance(kind, type) and issubclass(kind, (ctypes.Structure, ctypes.Union)):
            anonymous = getattr(kind, "_anonymous_", ())
            made["kind"] = "UNION" if issubclass(kind, ctypes.Union) else "STRUCT"
            made["size"] = ctypes.sizeof(kind)
            made["members"] = [
                {
                    "name": "(anon)" if field[0] in anonymous else field[0],
                    "type_id": number(field[1], "(anon)"),
                    "bits_offset": getattr(kind, field[0]).offset * 8,
                }
                for field in kind._fields_
            ]
        elif isinstance(kind, type) and issubclass(kind, ctypes.Array):
            made |= {"kind": "ARRAY", "type_id": number(kind._type_, "(anon)"), "nr_elems": kind._length_}
        else:
            made |= {"kind": "INT", "size": ctypes.sizeof(kind)}
        return int(made["id"])

    for name, structure in structures.items():
        number(structure, name)
    return {"types": types}


def fake_bpftool(folder: Path, answers: Mapping[str, Any]) -> Path:
    """Write a bpftool that has an answer for each file's stem; return the folder for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers))
    program = folder / "bpftool"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "answers = json.loads((pathlib.Path(__file__).parent / 'answers.json').read_text())\n"
        "stem = pathlib.Path(sys.argv[-1]).name.split('.')[0]\n"
        "print(json.dumps(answers.get(stem, {'error': 'no BTF in ' + stem})))\n"
    )
    os.chmod(program, 0o755)  # noqa: PTH101
    return folder

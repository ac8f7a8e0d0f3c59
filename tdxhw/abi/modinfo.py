"""What a module says of itself: in section .modinfo of its file; in ``modules.builtin.modinfo`` if it is built in."""

from dataclasses import dataclass
from pathlib import Path

from tdxhw.abi.elf import section


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A module's release and parameters."""

    release: str
    """Of its ``vermagic``; nothing where it has none, as in debug files."""
    parameters: dict[str, str]
    """Name: type (``tdx``: ``bool``)."""


def read_modinfo(path: Path, name: str) -> ModuleInfo:
    """Read a module's file, decompressed. Raise `AbiError`, naming `name`, when it is no ELF file."""
    return _parse(section(path, ".modinfo", name) or b"", "")


def built_in(modinfo: bytes, module: str) -> ModuleInfo | None:
    """Return what ``modules.builtin.modinfo`` says of `module`; None if it does not know it."""
    prefix = f"{module.replace('-', '_')}."
    return _parse(modinfo, prefix) if b"\0" + prefix.encode() in b"\0" + modinfo else None


def _parse(text: bytes, prefix: str) -> ModuleInfo:
    release = ""
    parameters: dict[str, str] = {}
    for entry in text.decode("utf-8", "replace").split("\0"):
        if not entry.startswith(prefix):
            continue
        key, _, value = entry[len(prefix) :].partition("=")
        if key == "vermagic":
            release = value.split(" ")[0]
        elif key == "parmtype":
            name, _, kind = value.partition(":")
            parameters[name] = kind
    return ModuleInfo(release, parameters)

"""The parts of one kernel build, wherever they were found."""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from tdxhw.abi.compression import decompress, kind_of
from tdxhw.abi.errors import AbiError
from tdxhw.abi.image import KernelImage, parse_image
from tdxhw.abi.modinfo import ModuleInfo, read_modinfo

MODULES: Final = ("kvm-intel", "kvm")


class Role(Enum):
    """What a file is to a kernel."""

    IMAGE = "image"
    CONFIG = "configuration"
    MODULE = "module"
    BUILT_IN = "modules.builtin.modinfo"
    DEBUG_IMAGE = "image with debug information"
    DEBUG_MODULE = "module with debug information"


_RELEASE: Final = r"(?P<release>[^/]+)"
_PLACES: Final = (
    # Where distributions and `make bindeb-pkg` put them; Debian 7.x has no /boot in its packages.
    (re.compile(rf"boot/vmlinuz-{_RELEASE}"), Role.IMAGE),
    (re.compile(rf"(usr/)?lib/modules/{_RELEASE}/vmlinuz"), Role.IMAGE),
    (re.compile(rf"boot/config-{_RELEASE}"), Role.CONFIG),
    (re.compile(rf"(usr/)?lib/modules/{_RELEASE}/config"), Role.CONFIG),
    (re.compile(rf"(usr/)?lib/modules/{_RELEASE}/modules\.builtin\.modinfo"), Role.BUILT_IN),
    (re.compile(rf"(usr/)?lib/modules/{_RELEASE}/(.*/)?(?P<module>kvm|kvm[-_]intel)\.ko(\.\w+)?"), Role.MODULE),
    (re.compile(rf"usr/lib/debug/(usr/)?lib/modules/{_RELEASE}/vmlinux"), Role.DEBUG_IMAGE),
    (
        re.compile(rf"usr/lib/debug/(usr/)?lib/modules/{_RELEASE}/(.*/)?(?P<module>kvm|kvm[-_]intel)\.ko(\.debug)?"),
        Role.DEBUG_MODULE,
    ),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What a path says of the file at it."""

    role: Role
    release: str
    module: str = ""  # of `MODULES`


def place_of(path: str) -> Place | None:
    """Return what a file at `path`, seen from the root of a file system, is to which kernel; None if nothing."""
    for pattern, role in _PLACES:
        found = pattern.fullmatch(path)
        if found:
            module = found.groupdict().get("module") or ""
            return Place(role, found["release"], module.replace("_", "-"))
    return None


@dataclass(slots=True)
class KernelFiles:
    """One kernel. Files are kept under `folder`, decompressed, as bpftool and pahole want them."""

    release: str
    folder: Path
    given: list[str] = field(default_factory=list)
    """What the user gave that this came from."""
    image: KernelImage | None = None
    image_from: str = ""
    base: Path | None = None
    """The vmlinux, or the BTF of the running one: what split BTF refers to."""
    config: str = ""
    config_from: str = ""
    modules: dict[str, Path] = field(default_factory=dict)
    """Files with the BTF of a module: ELF, or bare BTF of the running kernel."""
    module_info: dict[str, ModuleInfo] = field(default_factory=dict)
    built_in: bytes | None = None
    """``modules.builtin.modinfo``."""
    debug: dict[str, Path] = field(default_factory=dict)
    """Files that came with debug information: "vmlinux" or a module's name."""
    parameter: str = ""
    """What the running kvm_intel says of its parameter tdx."""

    def add(self, place: Place, data: bytes, name: str) -> None:
        """Take a file. Raise `AbiError`, naming `name`, when it is not what its place says."""
        match place.role:
            case Role.IMAGE | Role.DEBUG_IMAGE:
                self.add_image(parse_image(data, name), name, has_debug=place.role is Role.DEBUG_IMAGE)
            case Role.CONFIG:
                self.add_configuration(data.decode("utf-8", "replace"), name)
            case Role.BUILT_IN:
                self.built_in = data
            case Role.MODULE | Role.DEBUG_MODULE:
                self.add_module(place.module, data, name, has_debug=place.role is Role.DEBUG_MODULE)

    def add_image(self, image: KernelImage, name: str, *, has_debug: bool = False) -> None:
        """Take an image. Raise `AbiError` when it is of another release than its place or its package says."""
        if image.release != self.release:
            raise AbiError(f"{name}: it is Linux {image.release}, its place says {self.release}")
        before = self.image
        if before is not None and before.build_id and image.build_id and before.build_id != image.build_id:
            raise AbiError(
                f"{name}: another build of Linux {self.release} (build id {image.build_id}) than that from "
                f"{self.image_from} (build id {before.build_id}): give one at a time"
            )
        if self.image is None or not self.image.config:
            self.image, self.image_from = image, name
        path = self.folder / ("vmlinux.debug" if has_debug else "vmlinux")
        path.write_bytes(image.vmlinux)
        if has_debug:
            self.debug["vmlinux"] = path
        if self.base is None or not has_debug:
            self.base = path
        if image.config:  # a file beside it may have been edited since
            self.config, self.config_from = image.config, f"inside {name}"

    def add_configuration(self, text: str, name: str) -> None:
        """Take a file of configuration, unless the image has its own: that is what it was built with."""
        if self.image is None or not self.image.config:
            self.config, self.config_from = text, name

    def add_module(self, module: str, data: bytes, name: str, *, has_debug: bool = False) -> None:
        """Take a module, decompressed or not. Raise `AbiError` when it is of another kernel."""
        content = decompress(data, name) if kind_of(data) else data
        path = self.folder / f"{module}.ko{'.debug' if has_debug else ''}"
        path.write_bytes(content)
        info = read_modinfo(path, name)
        if info.release and info.release != self.release:
            raise AbiError(f"{name}: a module for Linux {info.release}, not for {self.release}")
        if has_debug:
            self.debug[module] = path
        else:
            self.modules[module] = path
            self.module_info[module] = info

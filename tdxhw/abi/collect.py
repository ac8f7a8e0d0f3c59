"""From what the user gave to kernels: packages, images, modules, folders, or the running one.

What belongs to one release becomes one kernel, however many files it was spread over. A file in a well-known place
brings its neighbours: ``/boot/vmlinuz-V`` its configuration and modules, ``vmlinux`` of a build tree what lies there.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tdxhw.abi import deb, elf
from tdxhw.abi.compression import decompress, kind_of
from tdxhw.abi.errors import AbiError
from tdxhw.abi.image import is_bzimage, parse_image, read_image
from tdxhw.abi.kernel_files import MODULES, KernelFiles, Place, Role, place_of
from tdxhw.abi.modinfo import read_modinfo
from tdxhw.abi.running import running_kernel

RUNNING: Final = "running"
_ROOT_GLOBS: Final = (
    "boot/vmlinuz-*",
    "boot/config-*",
    "{lib}/vmlinuz",
    "{lib}/config",
    "{lib}/modules.builtin.modinfo",
    "{lib}/kernel/arch/x86/kvm/kvm*.ko*",
    "usr/lib/debug/{lib}/vmlinux",
    "usr/lib/debug/{lib}/kernel/arch/x86/kvm/*.ko*",
)
_LIBS: Final = ("usr/lib/modules/*", "lib/modules/*")
_CONFIGURATION: Final = re.compile(rb"#\n# Automatically generated file; DO NOT EDIT\.\n# Linux/")
_RPM: Final = b"\xed\xab\xee\xdb"
_MODULE_FILE: Final = re.compile(r"(?P<module>kvm|kvm[-_]intel)\.ko(\.\w+)?")


class Collection:
    """Kernels by release, in the order in which they were met."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.kernels: dict[str, KernelFiles] = {}

    def kernel(self, release: str, given: str) -> KernelFiles:
        """Return the kernel of that release, a new one if it is the first file of it."""
        known = self.kernels.get(release)
        if known is None:
            folder = self.work / str(len(self.kernels))
            folder.mkdir()
            known = self.kernels[release] = KernelFiles(release, folder)
        if given not in known.given:
            known.given.append(given)
        return known


def collect(given: Sequence[str], work: Path) -> list[KernelFiles]:
    """Return the kernels that were given. Raise `AbiError` for what cannot be read; `work` holds what is unpacked."""
    collection = Collection(work)
    without: list[str] = []
    loose: list[Path] = []  # modules and configurations, which a release is wanted for
    for one in given:
        if one == RUNNING and not Path(one).exists():
            running = running_kernel(work / RUNNING)
            collection.kernels[f"{running.release} ({RUNNING})"] = running
            continue
        path = Path(one)
        if not path.exists():
            raise AbiError(f"{one}: no such file (a kernel is a .deb, a bzImage, a vmlinux, a folder, or '{RUNNING}')")
        if path.is_dir():
            _add_folder(collection, path)
        elif not path.is_file():
            raise AbiError(f"{one}: not a regular file: a pipe or a device cannot be read twice, give it as a file")
        elif _head(path).startswith(deb.MAGIC):
            found = False
            for place, inside, data in deb.kernel_parts(path):
                found = True
                collection.kernel(place.release, path.name).add(place, data, f"{path.name}:{inside}")
            if not found:
                without.append(one)
        elif _MODULE_FILE.fullmatch(path.name) or _CONFIGURATION.match(_head(path)):
            loose.append(path)
        else:
            _add_file(collection, path)
    for path in loose:
        if _MODULE_FILE.fullmatch(path.name):
            _add_loose_module(collection, path)
    for path in loose:
        if not _MODULE_FILE.fullmatch(path.name):
            _add_loose_configuration(collection, path)
    if without and not collection.kernels:
        raise AbiError(_no_kernel_in(without))
    return list(collection.kernels.values())


def _no_kernel_in(packages: Sequence[str]) -> str:
    parts = deb.parts_of_split_kernel(Path(packages[0]))
    if parts:
        return f"{packages[0]}: no kernel in it, it is split over several packages; give also {', '.join(parts)}"
    return f"{packages[0]}: a Debian package without a kernel"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(0x300)
    except OSError as error:
        raise AbiError(f"{path}: {error.strerror}") from None


def _add_file(collection: Collection, path: Path) -> None:
    head = _head(path)
    if kind_of(head):
        image = parse_image(decompress(_read(path), str(path)), str(path))
    elif is_bzimage(head) or head.startswith(elf.MAGIC):
        image = read_image(path)
    elif head.startswith(_RPM):
        raise AbiError(
            f"{path}: an RPM package, which is not read here: unpack it (rpm2cpio … | cpio -id) and give the folder"
        )
    else:
        raise AbiError(f"{path}: not a kernel: neither a Debian package, nor a bzImage, nor a vmlinux, nor a module")
    kernel = collection.kernel(image.release, path.name)
    kernel.add_image(image, path.name, has_debug=path.name.startswith("vmlinux"))
    for place, neighbour in _neighbours(path.resolve(), image.release):
        if place.role is not Role.IMAGE:
            kernel.add(place, _read(neighbour), str(neighbour))


def _neighbours(path: Path, release: str) -> Iterator[tuple[Place, Path]]:
    """Yield what lies beside an image: in the same build tree, or in the same root."""
    tree = path.parents[3] if path.match("arch/x86/boot/bzImage") else path.parent
    if (tree / "arch/x86/kvm").is_dir() and (tree / ".config").is_file():
        yield from _tree_parts(tree, release)
        return
    for depth in range(len(path.parents)):
        root = path.parents[depth]
        place = place_of(str(path.relative_to(root)))
        if place is not None and place.release == release:
            yield from ((one, file) for one, file in _root_parts(root) if one.release == release)
            return


def _tree_parts(tree: Path, release: str) -> Iterator[tuple[Place, Path]]:
    yield Place(Role.CONFIG, release), tree / ".config"
    for module in MODULES:
        file = tree / "arch/x86/kvm" / f"{module}.ko"
        if file.exists():
            yield Place(Role.MODULE, release, module), file
    if (tree / "modules.builtin.modinfo").exists():
        yield Place(Role.BUILT_IN, release), tree / "modules.builtin.modinfo"


def _root_parts(root: Path) -> Iterator[tuple[Place, Path]]:
    """Yield the files of every kernel under the root of a file system; where /lib is a link into /usr, once."""
    seen: set[Path] = set()
    for lib in _LIBS:
        for pattern in _ROOT_GLOBS:
            for file in sorted(root.glob(pattern.format(lib=lib))):
                place = place_of(str(file.relative_to(root)))
                real = file.resolve()
                if place is not None and real.is_file() and real not in seen:
                    seen.add(real)
                    yield place, file


def _add_folder(collection: Collection, folder: Path) -> None:
    """Take a build tree, or every kernel of an unpacked root."""
    for image in (folder / "vmlinux", folder / "arch/x86/boot/bzImage"):
        if image.is_file():
            _add_file(collection, image)
            return
    found = list(_root_parts(folder))
    if not found:
        raise AbiError(f"{folder}: no kernel in it: neither a build tree nor a root with /boot or /usr/lib/modules")
    for place, file in found:
        collection.kernel(place.release, str(folder)).add(place, _read(file), str(file))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AbiError(f"{path}: {error.strerror}{' (as root?)' if os.geteuid() else ''}") from None


def _add_loose_module(collection: Collection, path: Path) -> None:
    """Take a module that was given by itself: its vermagic says whose it is."""
    named = _MODULE_FILE.fullmatch(path.name)
    assert named is not None  # that is why it is here
    data = _read(path)
    content = decompress(data, str(path)) if kind_of(data) else data
    unpacked = collection.work / "module"
    unpacked.write_bytes(content)
    release = read_modinfo(unpacked, str(path)).release
    if not release:
        raise AbiError(f"{path}: a module that does not say for which kernel (no vermagic)")
    place = Place(Role.MODULE, release, named["module"].replace("_", "-"))
    collection.kernel(release, path.name).add(place, content, str(path))


def _add_loose_configuration(collection: Collection, path: Path) -> None:
    """Take a configuration that was given by itself: its name says whose it is, or there is one kernel only."""
    named = collection.kernels.get(path.name.removeprefix("config-"))
    kernels = [named] if named else list(collection.kernels.values())
    if len(kernels) != 1:
        several = ", ".join(kernel.release for kernel in kernels) or "none was given"
        raise AbiError(f"{path}: a configuration, but of which kernel ({several})? Call it config-RELEASE")
    kernels[0].add_configuration(_read(path).decode("utf-8", "replace"), path.name)
    kernels[0].given.append(path.name)

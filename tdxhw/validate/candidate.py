"""The kernel on trial: what the files given with ``--kernel`` hold, read before any host is touched."""

import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from tdxhw.abi.compression import open_stream
from tdxhw.abi.errors import AbiError
from tdxhw.abi.image import KernelImage, is_bzimage, parse_image
from tdxhw.errors import HarnessError

NO_MODULES: Final = "none"
"""As ``--modules``: the kernel has all it needs built in."""

_DEB: Final = b"!<arch>\n"
_MACHINE: Final = "amd64"
_RELEASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~:@=,%-]{0,63}")
"""It becomes part of paths, of a boot loader's configuration and of commands that root runs."""


class CandidateError(HarnessError):
    """The files are no kernel that can be tried."""


@dataclass(frozen=True, slots=True)
class Package:
    """What a .deb is called."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel build."""

    release: str  # what `uname -r` will say
    build_id: str  # GNU build id, hexadecimal; nothing if it was linked without
    image: Path | None  # a bzImage; None: it is in one of the packages
    packages: tuple[Package, ...] = ()
    modules: Path | None = None  # a tar archive that has lib/modules/RELEASE; None: in a package, or there are none
    modules_below: str = ""  # where in the archive: "lib/modules/RELEASE"
    installed_bytes: int = 0  # [bytes] roughly what it takes on the host
    image_bytes: int = 0  # [bytes] of the kernel image alone
    upload_bytes: int = 0  # [bytes] of the files that are sent
    is_signed: bool = False  # for Secure Boot; by whom is for the firmware to judge
    reads_initrd: bool = True  # CONFIG_BLK_DEV_INITRD; without it packages' scripts make no initial RAM disk

    @property
    def gets_initrd(self) -> bool:
        """Whether it has to have an initial RAM disk where the host's own kernel has one."""
        return self.reads_initrd and (bool(self.packages) or self.modules is not None)


def read_candidate(kernel: Sequence[Path], modules: str = "") -> Candidate:
    """Read packages, or one bzImage with `modules`: a tar archive, or `NO_MODULES`.

    ``CandidateError`` says in one line what they are instead.
    """
    for path in kernel:
        if not path.is_file():
            raise CandidateError(f"{path}: no such file")
    are_packages = [_is_package(path) for path in kernel]
    try:
        if all(are_packages):
            if modules:
                raise CandidateError("packages bring their modules; --modules is for a plain bzImage")
            return _from_packages(kernel)
        if any(are_packages) or len(kernel) != 1:
            raise CandidateError("give packages (.deb) or one bzImage")
        return _from_image(kernel[0], modules)
    except AbiError as error:
        raise CandidateError(str(error)) from error


def _is_package(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_DEB)) == _DEB


# ---- a plain image ----


def _from_image(path: Path, modules: str) -> Candidate:
    data = path.read_bytes()
    image = _bootable(data, str(path))
    archive, below, unpacked = None, "", 0
    if modules != NO_MODULES:
        if not modules:
            raise CandidateError(
                f"{path}: --modules TAR has to bring its modules (make modules_install INSTALL_MOD_PATH=DIR; "
                f"tar -C DIR -caf TAR lib), or --modules {NO_MODULES} say that it needs none"
            )
        archive = Path(modules)
        below, unpacked = _modules_in(archive, image.release)
    return Candidate(
        image.release, image.build_id, path, (), archive, below, len(data) + unpacked, len(data),
        len(data) + (archive.stat().st_size if archive is not None else 0), _is_signed(data),
        _reads_initrd(image.config),
    )  # fmt: skip


def _bootable(data: bytes, name: str) -> KernelImage:
    if not is_bzimage(data) and data[:4] == b"\x7fELF":
        raise CandidateError(f"{name}: no boot loader starts a vmlinux: give arch/x86/boot/bzImage")
    image = parse_image(data, name)
    if not _RELEASE.fullmatch(image.release):
        raise CandidateError(
            f"{name}: is called {image.release!r}, which is no name for a file on every host: letters, digits and "
            "._+~:@=,%- are; build it with another LOCALVERSION"
        )
    return image


def _reads_initrd(configuration: str) -> bool:
    """Whether a kernel of this configuration reads an initial RAM disk; most do, and where it is not known, too."""
    return not configuration or "\nCONFIG_BLK_DEV_INITRD=y\n" in f"\n{configuration}\n"


def _is_signed(data: bytes) -> bool:
    """Whether the image has a certificate table (PE/COFF: data directory 4 of the optional header)."""
    pe = int.from_bytes(data[0x3C:0x40], "little")
    if data[:2] != b"MZ" or data[pe : pe + 4] != b"PE\0\0" or data[pe + 24 : pe + 26] != b"\x0b\x02":
        return False
    certificates = pe + 24 + 112 + 4 * 8
    return int.from_bytes(data[certificates + 4 : certificates + 8], "little") > 0


def _modules_in(archive: Path, release: str) -> tuple[str, int]:
    """Return where in the archive the modules of `release` are, and their size [bytes]."""
    found: dict[str, int] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name.lstrip("./")).parts
                if "modules" in parts[:-1]:
                    depth = parts.index("modules") + 2
                    top = "/".join(parts[:depth])
                    found[top] = found.get(top, 0) + member.size
            _see_its_end(tar)
    except FileNotFoundError:
        raise CandidateError(f"{archive}: no such file") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = "it is no .tar, .tar.gz, .tar.bz2 or .tar.xz"
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        elif found:
            why = str(error).partition("\n")[0] or "it is cut short"
        raise CandidateError(f"{archive}: no tar archive that can be read: {why}") from error
    for top, size in found.items():
        if PurePosixPath(top).name == release:
            return top, size
    there = ", ".join(sorted(PurePosixPath(top).name for top in found)) or "none"
    raise CandidateError(f"{archive}: no modules of {release} in it; there are: {there}")


def _see_its_end(tar: tarfile.TarFile) -> None:
    """See that the archive ends where it ends: `tarfile` takes a broken header for the end, and misses the rest."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is damaged, or cut short")


# ---- Debian packages ----


def _from_packages(paths: Sequence[Path]) -> Candidate:
    packages, images, modules, size, configuration = [], {}, set(), 0, ""
    for path in paths:
        with _opened(path) as (control, members):
            missing = [field for field in ("Package", "Version", "Architecture") if field not in control]
            if missing:
                raise CandidateError(f"{path}: its control file does not say {', '.join(missing)}")
            architecture = control["Architecture"]
            if architecture not in (_MACHINE, "all"):
                raise CandidateError(f"{path}: is for {architecture}, not for {_MACHINE}")
            packages.append(Package(control["Package"], control["Version"], path))
            for member, stream in members:
                size += member.size
                parts = PurePosixPath(member.name.lstrip("./")).parts
                if _is_image(parts) and stream is not None:
                    images["/".join(parts)] = stream.read()
                elif parts[:1] == ("boot",) and parts[-1].startswith("config-") and stream is not None:
                    configuration = stream.read().decode("utf-8", "replace")
                elif "modules" in parts[:-1] and "kernel" in parts:
                    modules.add(parts[parts.index("modules") + 1])
    if not images:
        names = ", ".join(package.name for package in packages)
        raise CandidateError(
            f"no kernel image in {names}: a split kernel has it in linux-binary-…, give all its packages"
        )
    if len(images) > 1:
        raise CandidateError(f"more than one kernel: {', '.join(sorted(images))}")
    ((name, data),) = images.items()
    image = _bootable(data, name)
    if name.startswith("boot/") and name != f"boot/vmlinuz-{image.release}":
        raise CandidateError(f"{name} says that it is {image.release}: the package was not built from this image")
    if modules and image.release not in modules:
        raise CandidateError(f"{name} is {image.release}, and the modules are of {', '.join(sorted(modules))}")
    return Candidate(
        image.release, image.build_id, None, tuple(packages), installed_bytes=size, image_bytes=len(data),
        upload_bytes=sum(path.stat().st_size for path in paths), is_signed=_is_signed(data),
        reads_initrd=_reads_initrd(image.config or configuration),
    )  # fmt: skip


def _is_image(parts: tuple[str, ...]) -> bool:
    """Whether a file is a kernel: ``boot/vmlinuz-V``, or ``usr/lib/modules/V/vmlinuz`` of Debian since 7.3."""
    return (parts[:1] == ("boot",) and parts[-1].startswith("vmlinuz-")) or (
        "modules" in parts and parts[-1] == "vmlinuz"
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]]]:
    """Open a package: its control fields, and its files one after another."""
    try:
        from debian.arfile import ArError
        from debian.debfile import DebError, DebFile
    except ImportError:
        raise CandidateError(f"{path}: reading packages needs python-debian: pip install 'tdxhw[validate]'") from None
    try:
        with DebFile(str(path)) as deb:
            name = next(name for name in deb.getnames() if name.startswith("data.tar"))
            raw = io.BytesIO(deb.getmember(name).read())
            with tarfile.open(fileobj=open_stream(raw, name), mode="r|") as tar:
                yield deb.debcontrol(), ((member, tar.extractfile(member)) for member in tar if member.isfile())
    except (ArError, DebError, tarfile.TarError, OSError, EOFError, StopIteration) as error:
        raise CandidateError(f"{path}: no Debian package that can be read: {str(error) or 'it has no data'}") from error

"""What of a kernel is in a Debian package. python-debian reads its outer archive; only what is wanted is kept."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tdxhw.abi.compression import errors_of_broken_data, open_stream
from tdxhw.abi.errors import AbiError
from tdxhw.abi.kernel_files import Place, place_of

MAGIC: Final = b"!<arch>\n"


def kernel_parts(path: Path) -> Iterator[tuple[Place, str, bytes]]:
    """Yield the files of a kernel in the package: what each is, its path there, its contents.

    Raise `AbiError` when it is no Debian package or a broken one.
    """
    try:
        from debian.arfile import ArError, ArFile
    except ImportError:
        raise AbiError("reading a Debian package needs python-debian: pip install 'tdxhw[validate]'") from None
    try:
        with path.open("rb") as stream:
            members = {member.name: member for member in ArFile(fileobj=stream).getmembers()}
            name = next((name for name in members if name.startswith("data.tar")), "")
            if "debian-binary" not in members or not name:
                raise AbiError(f"{path}: an ar archive, but no Debian package, or one that is cut short")
            yield from _wanted(path, members[name], name)
    except (ArError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise AbiError(f"{path}: {error.strerror}") from None
        raise AbiError(f"{path}: not a Debian package that can be read: {error}") from None


def parts_of_split_kernel(path: Path) -> list[str]:
    """Return the packages of the same kernel that a linux-image without a kernel depends on."""
    from debian.debfile import DebFile

    with DebFile(path) as package:
        control = package.debcontrol()
    return re.findall(r"\blinux-(?:binary|modules|base)-\d\S*", f"{control.get('Depends', '')}")


def _wanted(path: Path, data: object, name: str) -> Iterator[tuple[Place, str, bytes]]:
    broken: tuple[type[Exception], ...] = (tarfile.TarError, *errors_of_broken_data())
    try:
        # Streaming, because a distribution's modules are hundreds of megabytes.
        with open_stream(data, name) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as tar:  # type: ignore[arg-type]
            for member in tar:
                inside = member.name.removeprefix("./")
                place = place_of(inside) if member.isfile() else None
                if place is not None:
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    yield place, inside, content.read()
            while unpacked.read(1 << 20):  # behind the last file: the end has to be there
                pass
    except AbiError:
        raise
    except broken as error:
        raise AbiError(f"{path}: cut short or broken: {error}") from None

"""tdxhw and what it needs, as one archive for a host without internet: pure Python, only Python 3.11 assumed."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

import tdxhw
import uapi_ctypes
from tdxhw.errors import HarnessError

_MAIN: Final = "import sys\n\nfrom tdxhw.cli import main\n\nsys.exit(main())\n"
_OURS: Final = (tdxhw, uapi_ctypes)  # the simulator stays at home
_COMPILED: Final = (".so", ".pyd", ".dylib")


@dataclass(frozen=True, slots=True)
class Archive:
    """A ``.tar.gz`` to unpack into a folder of its own; ``python3 FOLDER`` is then the ``tdxhw`` command."""

    data: bytes
    digest: str  # of the content: the same tdxhw is sent only once
    distributions: tuple[str, ...]  # "pytest 9.2.0"


def _needed(name: str, seen: dict[str, Distribution]) -> None:
    """Collect a distribution and what it requires, here and now."""
    key = name.lower().replace("_", "-")
    if key in seen:
        return
    try:
        found = distribution(name)
    except PackageNotFoundError as error:
        raise HarnessError(f"{name} is not installed, so it cannot be sent to lab hosts: pip install {name}") from error
    seen[key] = found
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _needed(requirement.name, seen)


def _files_of(found: Distribution) -> Iterator[tuple[str, bytes]]:
    for file in found.files or ():
        first = file.parts[0]
        if first == ".." or first.endswith((".dist-info", ".egg-info")) or "__pycache__" in file.parts:
            continue
        if file.suffix in _COMPILED:
            name = found.metadata["Name"]
            raise HarnessError(f"{name} has compiled code ({file}): install its pure Python version to use lab hosts")
        yield str(file), Path(str(found.locate_file(file))).read_bytes()


def _our_files() -> Iterator[tuple[str, bytes]]:
    for package in _OURS:
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package.__name__}/{path.relative_to(folder)}", path.read_bytes()


@cache
def build() -> Archive:
    """Return the archive. ``HarnessError`` if something in it is not pure Python."""
    seen: dict[str, Distribution] = {}
    try:
        ours = distribution("tdxhw")
    except PackageNotFoundError as error:
        raise HarnessError(
            "this tdxhw was never installed, so it cannot be packed: pip install one and use that"
        ) from error
    for line in ours.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _needed(requirement.name, seen)
    members = {"__main__.py": _MAIN.encode()}
    for found in seen.values():
        members.update(_files_of(found))
    members.update(_our_files())
    digest = hashlib.sha256()
    packed = io.BytesIO()
    # Same content, same bytes: no time, no owner, sorted names.
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name in sorted(members):
            content = members[name]
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    versions = tuple(sorted(f"{found.metadata['Name']} {found.version}" for found in seen.values()))
    return Archive(packed.getvalue(), digest.hexdigest()[:16], versions)

"""Bring suites of the user's own to a lab host: those that `tdxhw run` was given as paths."""

import io
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tdxhw.errors import HarnessError
from tdxhw.lab.connection import Session


def is_path(suite: str) -> bool:
    """Whether the user means a file or folder, not the name of a suite that tdxhw carries."""
    return "/" in suite or suite.endswith(".py")


def send(session: Session, suites: Sequence[str], folder: str) -> tuple[str, ...]:
    """Send the suites that are paths into `folder` on the host; return all of them as the host knows them.

    With a file goes the ``conftest.py`` beside it. Raise ``HarnessError`` if there is no such file.
    """
    there: list[str] = []
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for number, suite in enumerate(suites):
            if not is_path(suite):
                there.append(suite)
                continue
            path = Path(suite).resolve()
            if not path.exists():
                raise HarnessError(
                    f"no file {suite}; give the name of a suite (tdxhw run --list) or a path to your own"
                )
            # A folder of its own for each: two files of one name do not meet.
            tar.add(path, f"{number}/{path.name}", filter=_without_caches)
            beside = path.with_name("conftest.py")
            if path.is_file() and beside.is_file() and beside != path:
                tar.add(beside, f"{number}/{beside.name}")
            there.append(f"{folder}/{number}/{path.name}")
    if tuple(there) != tuple(suites):
        quoted = shlex.quote(folder)
        unpack = f"set -e; rm -rf {quoted}; mkdir -p {quoted}; tar -xzf - --no-same-owner -C {quoted}"
        session.check(unpack, stdin=packed.getvalue(), timeout_s=300, what=f"sending suites to {folder}")
    return tuple(there)


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in Path(member.name).parts else member

"""What a validation needs of a real host before it begins."""

from pathlib import Path

import pytest

from tdxhw.lab.connection import Completed
from tdxhw.lab.hosts import Host, SshTarget
from tdxhw.validate.errors import Refused
from tdxhw.validate.surroundings import LabSurroundings


class Link:
    """A connection as a user who is not root."""

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60) -> Completed:
        assert command == "id -u", "nothing else is done there"
        return Completed(0, "1000\n", "")

    def python(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 60, package: str = "") -> str:
        raise AssertionError("a lease that outlives a reboot is root's: it would end in a traceback")

    def upload(self, data: bytes, path: str) -> None:
        raise AssertionError(path)

    def close(self) -> None:
        """Close it."""


def test_who_is_not_root_is_told_so_before_the_lease(tmp_path: Path) -> None:
    host = Host("vm", SshTarget("vm", "me"), "labs/vm.yaml:1")
    with pytest.raises(
        Refused, match=r"^vm: installing a kernel needs root, and ssh takes us to user 1000: `ssh: root@"
    ):
        LabSurroundings(host, tmp_path, None, 300.0).hold(Link(), "tdxhw validate")

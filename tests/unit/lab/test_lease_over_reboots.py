"""A persistent lease: it holds over a reboot of the host, and is gone when it is given back or its holder has died."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdxhw.lab.errors import LeaseHeld
from tdxhw.lab.lease import Lease, holder_of, this_process
from tdxhw.lab.remote import lease as script

FILE = script.NAME
KEPT = f"{script.NAME}.kept"


class Here:
    """Runs what is sent to a host in a process of this machine; a reboot empties its /run."""

    class host:  # noqa: N801 (what a session has)
        name = "here"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, name: str, *arguments: str, stdin: bytes = b"") -> str:
        argv = [sys.executable, str(Path(script.__file__).with_name(name)), *arguments]
        return subprocess.run(argv, input=stdin, capture_output=True, check=True).stdout.decode()

    def reboot(self) -> None:
        (self.folder / FILE).unlink()


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def lease(here: Any, reason: str, **more: Any) -> Lease:
    return Lease(here, reason, folder=str(here.folder), **more)


def holder(here: Any) -> str:
    held = holder_of(here, folder=str(here.folder))
    return held.reason if held is not None else ""


def test_it_holds_over_a_reboot_and_is_given_back_everywhere(here: Here) -> None:
    with lease(here, "validate", persistent=True) as mine:
        here.reboot()
        assert holder(here) == "validate"
        with pytest.raises(LeaseHeld, match="for 'validate'"):
            lease(here, "somebody").take()
        mine.move_to(here)  # type: ignore[arg-type]
        assert (here.folder / FILE).read_text() == (here.folder / KEPT).read_text()
        here.reboot()
    assert holder(here) == ""
    assert not (here.folder / KEPT).exists()


def test_an_ordinary_one_is_gone_with_a_reboot(here: Here) -> None:
    with lease(here, "run"):
        here.reboot()
        assert holder(here) == ""
    assert not (here.folder / KEPT).exists()


def test_an_expired_one_holds_up_nobody_after_a_reboot(here: Here) -> None:
    lease(here, "abandoned", persistent=True, ttl_s=0.0).take()
    here.reboot()
    with lease(here, "next") as mine:
        assert "took over the expired lease of" in mine.note
        assert not (here.folder / KEPT).exists()
    assert holder(here) == ""


def test_a_torn_copy_is_no_lease(here: Here) -> None:
    (here.folder / KEPT).write_text('{"token": "x", "exp')
    lease(here, "next").take()
    assert holder(here) == "next"


def test_what_a_process_of_this_machine_left_that_has_died_is_taken_over_at_once(here: Here) -> None:
    boot, namespace, _, began = this_process().split()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process, may in (
        (f"{boot} {namespace} {dead.pid} {began}", True),
        (this_process(), False),
        (f"another-boot {namespace} {dead.pid} {began}", False),
        (f"{boot} pid:[1] {dead.pid} {began}", False),
        ("", False),
    ):
        here.python("lease.py", str(here.folder), "take", stdin=(
            f'{{"token": "x", "owner": "o", "reason": "left", "ttl_s": 99, "process": "{process}", "persistent": true}}'
        ).encode())  # fmt: skip
        if may:
            with lease(here, "next") as mine:
                assert "took over the abandoned lease of o (left)" in mine.note
        else:
            with pytest.raises(LeaseHeld):
                lease(here, "next").take()
            here.python("lease.py", str(here.folder), "release", stdin=b'{"token": "x"}')

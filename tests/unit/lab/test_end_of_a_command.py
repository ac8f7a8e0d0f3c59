"""What a command writes just before it ends arrives, however it is cut into packets."""

from types import SimpleNamespace
from typing import Any

import pytest

from tdxhw.lab.connection import Session
from tdxhw.lab.hosts import Host, SshTarget
from tdxhw.lab.shell_command import MARK


class LastMinute:
    """A channel on which everything comes at once: output, end and exit status, at the moment in which it is asked."""

    exit_status = 7

    def __init__(self) -> None:
        self._data = {"out": b"", "err": b""}
        self.eof_received = False

    def exit_status_ready(self) -> bool:
        if not self.eof_received:
            self._data, self.eof_received = {"out": MARK + b"the last line\n", "err": MARK + b"and why\n"}, True
        return True

    def recv_ready(self) -> bool:
        return bool(self._data["out"])

    def recv_stderr_ready(self) -> bool:
        return bool(self._data["err"])

    def recv(self, _count: int) -> bytes:
        data, self._data["out"] = self._data["out"], b""
        return data

    def recv_stderr(self, _count: int) -> bytes:
        data, self._data["err"] = self._data["err"], b""
        return data

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def session() -> Session:
    transport = SimpleNamespace(is_active=lambda: True, open_session=lambda timeout: LastMinute(), close=lambda: None)
    return Session(Host("vm", SshTarget("vm", "root", 22), "t:1"), SimpleNamespace(transport=transport))


def test_of_a_short_command(session: Session) -> None:
    done = session.run("true")
    assert (done.exit_code, done.stdout, done.stderr) == (7, "the last line\n", "and why\n")


def test_of_a_supervised_command(session: Session) -> None:
    lines: list[str] = []
    console: list[str] = []
    assert session.supervise(["true"], limit_s=5, on_line=lines.append, on_console=console.append) == 7
    assert (lines, console) == (["the last line"], ["and why"])

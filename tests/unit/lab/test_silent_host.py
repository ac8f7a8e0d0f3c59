"""A host that is gone while something in between still acknowledges for it: a jump host, a NAT, a VM's network."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import paramiko
import pytest

from tdxhw.lab import connection
from tdxhw.lab.connection import Session
from tdxhw.lab.errors import ConnectionLost, LabUnreachable
from tdxhw.lab.hosts import Host, SshTarget
from tdxhw.lab.shell_command import MARK
from tests.unit.lab.shell_server import session_with
from tests.unit.lab.test_power import is_alive


class Silent(paramiko.ServerInterface):
    """Lets everybody in, opens channels, and answers no command."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        self.over.wait(30)
        return paramiko.common.OPEN_FAILED_CONNECT_FAILED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.over.wait(30)
        return False


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    key = paramiko.RSAKey.generate(2048)
    key.write_private_key_file(str(tmp_path / "id"))
    server = Silent()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    port = listener.getsockname()[1]

    def serve() -> None:
        transports = []
        while not server.over.is_set():
            with suppress(TimeoutError):
                transports.append(paramiko.Transport(listener.accept()[0]))
                transports[-1].add_server_key(key)
                transports[-1].start_server(server=server)
        for transport in transports:
            transport.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    (tmp_path / "config").write_text(f"Host *\n  IdentityFile {tmp_path / 'id'}\n  IdentitiesOnly yes\n")
    host = Host("silent", SshTarget("127.0.0.1", "root", port), "test:1")
    with Session.open(host, tmp_path, ssh_config=tmp_path / "config") as session:
        yield session
    server.over.set()
    thread.join(10)
    listener.close()


def test_a_jump_host_that_goes_no_further_is_not_waited_for_longer_than_any_other(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.5)
    config = tmp_path / "config"
    jump = session.host.ssh
    config.write_text(f"Host behind\n  ProxyJump root@{jump.host}:{jump.port}\n" + config.read_text())
    started = time.monotonic()
    with pytest.raises(LabUnreachable, match=r"^behind: "):
        Session.open(Host("behind", SshTarget("behind", "root", 22), "test:1"), tmp_path, ssh_config=config)
    assert time.monotonic() - started < 10, "paramiko's own limit is an hour"


def test_a_host_that_died_behind_one_that_acknowledges_for_it_is_a_lost_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it runs begins and then says nothing any more, as a supervisor on a host whose kernel hangs.
    shell = tmp_path / "dead"
    shell.write_text(f"#!/bin/sh\necho '{MARK.decode().strip()}'\nsleep 30\n")
    shell.chmod(0o755)
    monkeypatch.setattr(connection, "SILENCE_S", 0.2)
    started = time.monotonic()
    with session_with([str(shell)], tmp_path) as session:
        with pytest.raises(ConnectionLost, match=r"the connection is lost \(no sign of life for 0\.6 s\)"):
            session.supervise(["true"], limit_s=60)
        assert time.monotonic() - started < 10


def test_a_command_that_says_nothing_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    monkeypatch.setattr(connection, "_HEARTBEAT_S", 0.1)
    lines: list[str] = []
    with session_with(["sh"], tmp_path) as session:
        code = session.supervise(["sh", "-c", "sleep 4.5; exit 3"], limit_s=60, on_line=lines.append)
    assert (code, lines) == (3, []), "its supervisor's signs of life are nobody's line"


def test_a_supervisor_whose_words_nobody_takes_ends_the_command_all_the_same(tmp_path: Path) -> None:
    log, pid = tmp_path / "log", tmp_path / "pid"
    source = files("tdxhw.lab.remote").joinpath("supervise.py").read_text(encoding="utf-8")
    command = f"echo $$ >{pid}; yes 'a result' | head -c 4000000 >{log}; exec sleep 300"
    argv = [sys.executable, "-c", source, "300", "1.5", str(log), "0", "--", "sh", "-c", command]
    # Both pipes stay open, as when a cable was pulled: nobody writes to the one and nobody reads the other.
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.wait(timeout=30) == 125
    assert not is_alive(int(pid.read_text()))


def test_a_command_that_is_never_answered_is_a_lost_connection(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(ConnectionLost, match="silent: the connection is lost"):
        session.run("true")
    assert time.monotonic() - started < 10

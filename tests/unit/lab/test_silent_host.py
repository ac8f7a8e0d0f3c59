"""A host that is gone while something in between still acknowledges for it: a jump host, a NAT, a VM's network."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from tdxhw.lab import connection
from tdxhw.lab.connection import Session
from tdxhw.lab.errors import ConnectionLost
from tdxhw.lab.hosts import Host, SshTarget


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

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.over.wait(30)
        return False


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    key = paramiko.RSAKey.generate(2048)
    key.write_private_key_file(str(tmp_path / "id"))
    server = Silent()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        client, _ = listener.accept()
        transport = paramiko.Transport(client)
        transport.add_server_key(key)
        transport.start_server(server=server)
        server.over.wait(30)
        transport.close()

    thread = threading.Thread(target=serve)
    thread.start()
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    (tmp_path / "config").write_text(f"Host *\n  IdentityFile {tmp_path / 'id'}\n  IdentitiesOnly yes\n")
    host = Host("silent", SshTarget("127.0.0.1", "root", port), "test:1")
    with Session.open(host, tmp_path, ssh_config=tmp_path / "config") as session:
        yield session
    server.over.set()
    thread.join(10)
    listener.close()


def test_a_command_that_is_never_answered_is_a_lost_connection(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 0.3)
    started = time.monotonic()
    with pytest.raises(ConnectionLost, match="silent: the connection is lost"):
        session.run("true")
    assert time.monotonic() - started < 10

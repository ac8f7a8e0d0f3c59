"""An ssh server in this process that hands each command to a login shell, as sshd does."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko

from tdxhw.lab.connection import Session
from tdxhw.lab.hosts import Host, SshTarget


class ShellServer(paramiko.ServerInterface):
    """Runs ``SHELL… -c COMMAND``. Of a shell that a signal ended it tells no exit status, as paramiko sees it."""

    def __init__(self, shell: Sequence[str], environ: Mapping[str, str]) -> None:
        self._shell = list(shell)
        self._environ = dict(environ)
        self.over = threading.Event()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.common.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        process = subprocess.Popen(
            [*self._shell, "-c", command.decode()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=self._environ,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        def copy(source: int, send: object) -> None:
            while data := os.read(source, 4096):
                send(data)  # type: ignore[operator]

        def feed() -> None:
            assert process.stdin is not None
            with suppress(OSError), process.stdin:
                while data := channel.recv(4096):
                    process.stdin.write(data)
                    process.stdin.flush()

        threading.Thread(target=feed, daemon=True).start()
        copiers = [
            threading.Thread(target=copy, args=(process.stdout.fileno(), channel.sendall), daemon=True),
            threading.Thread(target=copy, args=(process.stderr.fileno(), channel.sendall_stderr), daemon=True),
        ]
        for copier in copiers:
            copier.start()
        for copier in copiers:
            copier.join()
        code = process.wait()
        process.stdout.close()
        process.stderr.close()
        if code >= 0:
            channel.send_exit_status(code)
        channel.close()


@contextmanager
def session_with(shell: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> Iterator[Session]:
    """Connect to a host whose login shell is `shell`."""
    key = paramiko.ECDSAKey.generate()
    key.write_private_key_file(str(folder / "id"))
    server = ShellServer(shell, {"PATH": os.environ["PATH"], **(environ or {})})
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        client, _ = listener.accept()
        transport = paramiko.Transport(client)
        transport.add_server_key(key)
        transport.start_server(server=server)
        server.over.wait(60)
        transport.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    (folder / "config").write_text(f"Host *\n  IdentityFile {folder / 'id'}\n  IdentitiesOnly yes\n")
    host = Host("vm", SshTarget("127.0.0.1", "root", port), "test:1")
    try:
        with Session.open(host, folder, ssh_config=folder / "config") as session:
            yield session
    finally:
        server.over.set()
        thread.join(10)
        listener.close()

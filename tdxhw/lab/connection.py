"""A connection to a lab host: Fabric over paramiko, with ssh's own configuration, agent and jump hosts.

What differs from their defaults: unknown host keys are refused; a command has a time limit on the host itself; a
lost connection (`ConnectionLost`) is told apart from a failed command (`Completed.exit_code`).
"""

import errno
import logging
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tdxhw.lab.errors import ConnectionLost, HostKeyRefused, LabUnreachable, RemoteFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.shell_command import Lines, after_mark, for_any_shell

try:
    import paramiko
    from fabric import Config, Connection

    from tdxhw.lab import host_keys
except ImportError as missing:
    raise LabUnreachable("lab hosts are reached with Fabric: pip install 'tdxhw[lab]'") from missing

CONNECT_TIMEOUT_S: Final = 15
_TIMEOUTS: Final = ("banner_timeout", "auth_timeout", "channel_timeout")  # without the last it is an hour
SILENCE_S: Final = 30.0
"""After this long without a sign of life, each side takes the other for lost [s]."""

TIME_LIMIT: Final = 124
LOST: Final = 125
_HEARTBEAT_S: Final = SILENCE_S / 6
_DEAF: Final = 3  # times SILENCE_S: a busy host may be late with its signs of life
_GRACE_S: Final = 25.0  # what the supervisor may need to end a command, on top of its limit
_POLL_S: Final = 0.02
_SLOWEST: Final = 250_000  # [bytes/s] of an upload: kernels with debug information are a gigabyte
_GOING_DOWN: Final = (128 + signal.SIGTERM, 128 + signal.SIGHUP)  # what ends commands when a host shuts down
_BY_SIGNAL: Final = {128 + number: number.name for number in signal.Signals if number < 32}

# Its tracebacks about hosts that are not up yet tell nothing that our errors do not.
logging.getLogger("paramiko.transport").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ran to its end on the host."""

    exit_code: int
    stdout: str
    stderr: str


class Session:
    """An open connection to one lab host."""

    def __init__(self, host: Host, connection: Connection) -> None:
        self.host = host
        self._connection = connection

    @classmethod
    def open(cls, host: Host, labs: Path, *, ssh_config: Path | None = None) -> Self:
        """Connect, or raise ``LabUnreachable`` that says what is in the way and what to do."""
        connection = _prepare(host, labs, ssh_config)
        try:
            connection.open()
        except HostKeyRefused:
            raise
        except paramiko.BadHostKeyException as error:
            raise host_keys.changed(host.name, error) from error
        except paramiko.SSHException as error:
            if not _is_about_keys(error):
                raise LabUnreachable(f"{host.name}: {connection.host}:{connection.port}: {_reason(error)}") from error
            raise LabUnreachable(
                f"{host.name}: {connection.host} accepts none of our keys for user {connection.user}; "
                f"`ssh-add -l` shows them, `ssh {host.ssh}` has to work without a password"
            ) from error
        except (OSError, EOFError) as error:
            raise LabUnreachable(f"{host.name}: {connection.host}:{connection.port}: {_reason(error)}") from error
        transport = connection.transport
        assert transport is not None
        if isinstance(transport.sock, socket.socket):
            # The kernel gives up on a peer that acknowledges nothing, also when a cable was pulled.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))
        return cls(host, connection)

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection; what still runs over it ends on the host."""
        self._connection.close()

    # ---- commands ----

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60) -> Completed:
        """Run a short shell command, in sh whatever the login shell is. `timeout_s` [s] is enforced on the host.

        One that a signal ended has no exit code: ``ConnectionLost`` if the host seems to go down, else
        ``RemoteFailed``.
        """
        # `exit`: sh outlives timeout(1) and says by which signal it ended; of sshd's own word for that paramiko tells
        # nothing.
        began = time.monotonic()
        channel = self._channel(f"timeout -k 5 {timeout_s} sh -c {shlex.quote(command)}; exit $?")
        try:
            self._feed(channel, stdin)
            done = self._collect(channel, time.monotonic() + timeout_s + _GRACE_S)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost(error) from error
        finally:
            channel.close()
        is_late = time.monotonic() - began >= timeout_s  # timeout(1) kills what does not end by itself
        if done.exit_code == TIME_LIMIT or (is_late and done.exit_code == 128 + signal.SIGKILL):
            raise RemoteFailed(f"{self.host.name}: still running after {timeout_s:g} s: {command[:100]}")
        if done.exit_code in _GOING_DOWN:
            raise self._lost(None, f"{_BY_SIGNAL[done.exit_code]} ended the command: is the host going down?")
        if done.exit_code in _BY_SIGNAL:
            raise RemoteFailed(f"{self.host.name}: {_BY_SIGNAL[done.exit_code]} ended there: {command[:100]}")
        return done

    def check(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60, what: str = "") -> str:
        """Run a short shell command that has to work; return its output.

        Else ``RemoteFailed`` says `what` could not be done (without it, the command) and quotes the error.
        """
        done = self.run(command, stdin=stdin, timeout_s=timeout_s)
        if done.exit_code != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            said = lines[-1] if "Traceback" in done.stderr else lines[0]
            said = next((line for line in lines if os.strerror(errno.ENOSPC) in line), said)  # tar buries it
            raise RemoteFailed(f"{self.host.name}: {what or command[:100]}: exit code {done.exit_code}: {said}")
        return done.stdout

    def python(
        self,
        script: str,
        *arguments: str,
        stdin: bytes = b"",
        timeout_s: float = 60,
        package: str = "tdxhw.lab.remote",
    ) -> str:
        """Run one of the files of `package` with the host's Python; return its output."""
        source = files(package).joinpath(script).read_text(encoding="utf-8")
        command = shlex.join(["python3", "-c", source, *arguments])
        return self.check(command, stdin=stdin, timeout_s=timeout_s, what=f"{script} {' '.join(arguments)}".rstrip())

    def supervise(
        self,
        argv: Sequence[str],
        *,
        limit_s: float,
        follow: str = "-",
        offset: int = 0,
        on_line: Callable[[str], None] | None = None,
        on_console: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Run a long command under the supervisor; hand over each line of the file `follow`, and of its console.

        Return its exit code; `TIME_LIMIT` if the supervisor ended it. Raise ``ConnectionLost`` if the connection
        ended before the command: then the host ends the command, too. Once `stop` says so, the command is asked
        to end; what it still writes is handed over, and the exit code is `LOST`.
        """
        source = files("tdxhw.lab.remote").joinpath("supervise.py").read_text(encoding="utf-8")
        head = ["python3", "-c", source, str(limit_s), str(SILENCE_S), follow, str(offset), "--"]
        channel = self._channel("exec " + shlex.join([*head, *argv]))
        lines, console = Lines(on_line), Lines(on_console)
        heard = time.monotonic()
        deadline = heard + limit_s + _GRACE_S
        beat = 0.0
        stopping = False
        try:
            while True:
                has_ended = _has_ended(channel)
                busy = lines.take(channel.recv, ready=channel.recv_ready())
                busy |= console.take(channel.recv_stderr, ready=channel.recv_stderr_ready())
                if has_ended and not busy:
                    break
                now = time.monotonic()
                heard = now if busy else heard
                if now > deadline or not self._is_active():
                    raise self._lost(None)
                if now - heard > _DEAF * SILENCE_S:  # what is between us, a jump host, may acknowledge for a dead host
                    raise self._lost(None, f"no sign of life for {_DEAF * SILENCE_S:g} s")
                if not stopping and stop():
                    stopping = True
                    channel.shutdown_write()  # the supervisor takes it for a lost connection
                    deadline = now + _GRACE_S
                if not stopping and now - beat > _HEARTBEAT_S:
                    channel.sendall(b".")
                    beat = now
                if not busy:
                    time.sleep(_POLL_S)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost(error) from error
        finally:
            channel.close()
        if channel.exit_status == -1 or (channel.exit_status == LOST and not stopping):
            raise self._lost(None)
        if not lines.begun:
            raise self._never_began(lines.before + console.before)
        lines.flush()
        console.flush()
        return channel.exit_status

    def upload(self, data: bytes, path: str) -> None:
        """Write a file on the host, whole or not at all. A full disk is a ``RemoteFailed``."""
        quoted = shlex.quote(path)
        limit_s = 300 + len(data) / _SLOWEST
        # mktemp: two uploads of one file do not write into each other's.
        self.check(
            f'set -e; mkdir -p "$(dirname {quoted})"; t=$(mktemp {quoted}.XXXXXX); trap \'rm -f "$t"\' EXIT; '
            f'cat >"$t"; sync "$t"; mv "$t" {quoted}; sync "$(dirname {quoted})"',
            stdin=data,
            timeout_s=limit_s,
            what=f"writing {path}",
        )

    # ---- inside ----

    def _channel(self, command: str) -> paramiko.Channel:
        transport = self._connection.transport
        if transport is None or not transport.is_active():
            raise self._lost(None)
        # paramiko waits without a limit for the answer to this. A host that rebooted behind a jump host or a NAT, which
        # acknowledge what it will never see, would keep us here for ever.
        watchdog = threading.Timer(SILENCE_S, transport.close)
        watchdog.daemon = True
        watchdog.start()
        try:
            channel: paramiko.Channel = transport.open_session(timeout=CONNECT_TIMEOUT_S)
            channel.exec_command(for_any_shell(command))
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost(error) from error
        finally:
            watchdog.cancel()
        channel.settimeout(SILENCE_S)
        return channel

    def _feed(self, channel: paramiko.Channel, data: bytes) -> None:
        try:
            if data:
                channel.sendall(data)
            channel.shutdown_write()
        except OSError:
            # A command that ends before it has read everything closes its end. It has an exit code all the same.
            if not self._is_active():
                raise

    def _is_active(self) -> bool:
        transport = self._connection.transport
        return transport is not None and bool(transport.is_active())

    def _collect(self, channel: paramiko.Channel, deadline: float) -> Completed:
        stdout, stderr = bytearray(), bytearray()
        while True:
            has_ended, busy = _has_ended(channel), False
            if channel.recv_ready():
                stdout += channel.recv(65536)
                busy = True
            if channel.recv_stderr_ready():
                stderr += channel.recv_stderr(65536)
                busy = True
            if has_ended and not busy:
                break
            if time.monotonic() > deadline or not self._is_active():
                raise self._lost(None)
            if not busy:
                time.sleep(_POLL_S)
        if channel.exit_status == -1:  # no exit status came: the connection ended, not the command
            raise self._lost(None)
        mine = after_mark(stdout)
        if mine is None:
            raise self._never_began(stdout + stderr)
        also = after_mark(stderr)
        said = stderr if also is None else also
        return Completed(channel.exit_status, mine.decode("utf-8", "replace"), said.decode("utf-8", "replace"))

    def _lost(self, error: BaseException | None, why: str = "") -> ConnectionLost:
        if error is not None and str(error):
            why = _reason(error)
        return ConnectionLost(f"{self.host.name}: the connection is lost{f' ({why})' if why else ''}")

    def _never_began(self, said: bytes | bytearray) -> RemoteFailed:
        lines = said.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        return RemoteFailed(
            f"{self.host.name}: its login shell runs no commands for us ({lines[-1].strip()[:200]}); "
            f"`ssh {self.host.ssh} true` has to work"
        )


def _has_ended(channel: paramiko.Channel) -> bool:
    """Whether nothing more will arrive. To be asked before what arrived is taken, else the last of it is missed."""
    return bool(channel.exit_status_ready() and channel.eof_received)


def _prepare(host: Host, labs: Path, ssh_config: Path | None) -> Connection:
    config = Config(lazy=True)
    if ssh_config is not None:
        config = Config(lazy=True, runtime_ssh_path=str(ssh_config))
    config.load_ssh_config()
    connection = Connection(
        host.ssh.host,
        user=host.ssh.user,
        port=host.ssh.port,
        config=config,
    )
    hop: Connection | None = connection
    while isinstance(hop, Connection):  # a jump host's key is checked like any other, and it has to answer in time
        hop.connect_timeout = CONNECT_TIMEOUT_S
        hop.connect_kwargs = dict(hop.connect_kwargs) | dict.fromkeys(_TIMEOUTS, CONNECT_TIMEOUT_S)
        configured = str(hop.ssh_config.get("userknownhostsfile", "")).split()
        host_keys.load_known(hop.client, labs, configured)
        name = host.name if hop is connection else str(hop.host)
        hop.client.set_missing_host_key_policy(host_keys.RefuseUnknown(name))
        hop = hop.gateway
    return connection


def probe_key(
    host: Host, labs: Path, *, ssh_config: Path | None = None
) -> tuple[str, paramiko.PKey, paramiko.PKey | None]:
    """Return the name under which the host is known, the key that it shows, and the known one if that is another."""
    connection = _prepare(host, labs, ssh_config)
    shown: list[paramiko.PKey] = []

    class Remember(paramiko.MissingHostKeyPolicy):
        """Takes the key down and goes no further."""

        def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
            """Raise, so that no authentication is tried."""
            shown.append(key)
            raise HostKeyRefused(hostname)

    connection.client.set_missing_host_key_policy(Remember())
    known_name = host_keys.known_host_name(str(connection.host), int(connection.port))
    expected = None
    try:
        connection.open()
        assert connection.transport is not None
        shown.append(connection.transport.get_remote_server_key())
    except paramiko.BadHostKeyException as error:
        shown.append(error.key)
        expected = error.expected_key
    except paramiko.AuthenticationException:
        transport = connection.client.get_transport()  # the key was checked before
        if transport is not None:
            shown.append(transport.get_remote_server_key())
    except HostKeyRefused as error:
        if not shown:  # a jump host's
            raise LabUnreachable(str(error)) from error
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise LabUnreachable(f"{host.name}: {connection.host}:{connection.port}: {_reason(error)}") from error
    finally:
        connection.close()
    if not shown:
        raise LabUnreachable(f"{host.name}: shows no host key")
    return known_name, shown[0], expected


def _is_about_keys(error: paramiko.SSHException) -> bool:
    # paramiko has no class of its own for having nothing to offer.
    return isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return f"its name is not known ({error.strerror}): check ssh in its lab file"
    if isinstance(error, TimeoutError):
        return "no answer: is it up? (power, network, firewall)"
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        return "; ".join(sorted({str(one) for one in error.errors.values()}))
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

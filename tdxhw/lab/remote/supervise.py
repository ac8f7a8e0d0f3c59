"""Run a command on a lab host so that it ends in time, and ends when whoever started it is gone.

Usage: ``supervise.py LIMIT_S SILENCE_S FOLLOW OFFSET -- COMMAND…``

Whoever started it keeps writing to standard input: SILENCE_S seconds without a byte, or its end, mean that the
connection is lost, and the command's whole process group is ended. What the command appends to the file FOLLOW
(``-``: none) from OFFSET on goes to standard output, whole lines as they come, and now and then a NUL: the host is
alive, too. What the command prints goes to standard error. Exit code: the command's, 128 + signal, 124 at the time
limit, 125 when the connection was lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

TIME_LIMIT = 124
LOST = 125
GRACE_S = 10.0  # between SIGTERM and SIGKILL: a run writes its partial results meanwhile
POLL_S = 0.05
PIPE_BUF = 4096  # a pipe into which something fits takes this much without blocking


class Lost(Exception):  # noqa: N818
    """Whoever started us is gone."""


class Peer:
    """Whoever started us: writes to our standard input, reads our standard output."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self.heard = self.told = time.monotonic()
        self.has_hung_up = False

    def listen(self, limit_s: float, to: tuple[int, ...] = ()) -> bool:
        """Wait for a sign of life, or until what is sent `to` it finds room; return whether it does."""
        readable, writable, _ = select.select(() if self.has_hung_up else (0,), to, (), limit_s)
        now = time.monotonic()
        if readable:
            if not os.read(0, 4096):
                self.has_hung_up = True
                raise Lost
            self.heard = now
        if now - self.heard > self.silence_s:
            self.has_hung_up = True
            raise Lost
        return bool(writable)

    def send(self, data: bytes) -> None:
        """Send all of it. A connection that takes nothing more must not keep us from noticing that it is lost."""
        while data:
            if self.listen(POLL_S, (1,)):
                data = data[os.write(1, data[:PIPE_BUF]) :]
                self.told = time.monotonic()

    def show_life(self) -> None:
        """Say that the host is alive, if nothing else did."""
        if time.monotonic() - self.told > self.silence_s / 6:
            self.send(b"\0")


class Follower:
    """Copies what is appended to a file to standard output."""

    def __init__(self, path: str, offset: int, peer: Peer) -> None:
        self.path = path
        self.peer = peer
        self.offset = offset
        self.partial = b""
        self.fd = -1

    def copy(self) -> None:
        """Copy the whole lines that are there."""
        if self.path == "-":
            return
        if self.fd < 0:
            try:
                self.fd = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                return
            os.lseek(self.fd, self.offset, os.SEEK_SET)
        while True:
            data = os.read(self.fd, 65536)
            if not data:
                return
            whole, newline, rest = (self.partial + data).rpartition(b"\n")
            self.partial = rest
            self.peer.send(whole + newline)


def end(command: subprocess.Popen[bytes], follower: Follower | None) -> None:
    """End the command's process group: asked first, then killed. Nobody of it is left."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(command.pid, number)
        except ProcessLookupError:
            return
        until = time.monotonic() + patience
        while time.monotonic() < until:
            command.poll()
            try:
                os.killpg(command.pid, 0)
            except ProcessLookupError:
                return
            if follower is not None:
                try:
                    follower.copy()
                except (Lost, BrokenPipeError):
                    follower = None
            time.sleep(POLL_S)


def supervise(limit_s: float, peer: Peer, follower: Follower, argv: list[str]) -> int:
    """Run the command until it ends, the time is up, or nobody listens any more."""
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    deadline = time.monotonic() + limit_s
    try:
        while command.poll() is None:
            follower.copy()
            if time.monotonic() > deadline:
                end(command, follower)
                follower.copy()
                return TIME_LIMIT
            peer.show_life()
            peer.listen(POLL_S)
        follower.copy()
    except Lost:
        end(command, follower)  # who has only closed our input reads on
        with contextlib.suppress(Lost, BrokenPipeError):
            follower.copy()
        return LOST
    except BrokenPipeError:
        return LOST
    finally:
        end(command, None)  # what it left running, too
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


def main(arguments: list[str]) -> int:
    """Read the command line."""
    limit_s, silence_s, follow, offset, dashes, *argv = arguments
    if dashes != "--" or not argv:
        sys.stderr.write("supervise: " + __doc__.splitlines()[2] + "\n")
        return 2
    # A hang-up is a lost connection like any other: it ends the command, not only us.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        peer = Peer(float(silence_s))
        return supervise(float(limit_s), peer, Follower(follow, int(offset), peer), argv)
    except FileNotFoundError as error:
        sys.stderr.write("supervise: " + str(error) + "\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

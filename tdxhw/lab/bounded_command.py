"""Run a program of this machine for a limited time, it and whatever it has started."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_MOST_OUTPUT: int = 1 << 20  # [bytes] nobody asks for more, and no program may fill our memory
_POLL_S: float = 0.1
_END_S: float = 5.0
_PIPE_S: float = 0.5  # for what is still in the pipes of a program that has ended


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ran to its end, or was ended (`exit_code` is None)."""

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """The last line that it wrote, to standard error or else to standard output."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip() if lines else "no message"


def run_bounded(argv: Sequence[str], limit_s: float, environ: Mapping[str, str] | None = None) -> Finished:
    """Run `argv` (no shell) for at most `limit_s` [s]. ``OSError`` if it cannot be started.

    It has a session of its own, so that the limit also ends what it started, and Ctrl-C does not cut it off halfway.
    """
    process = subprocess.Popen(
        list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    try:
        with process.stdout, process.stderr:
            code = _until_it_ends(process, said, limit_s)
            if code is None:
                end_group(process)
                _until_it_ends(process, said, _PIPE_S)
    except BaseException:
        end_group(process)
        raise
    stdout, stderr = said.values()
    return Finished(code, _text(stdout), _text(stderr))


def _until_it_ends(process: "subprocess.Popen[bytes]", said: Mapping[int, bytearray], limit_s: float) -> int | None:
    """Add to `said` what the program writes until it ends; return its exit code, None if it has not ended in time.

    What it leaves running (an ssh that stays for the next one, a daemon) may keep its pipes open: that is not waited
    for.
    """
    until = time.monotonic() + limit_s
    open_pipes = set(said)
    while open_pipes and (left_s := until - time.monotonic()) > 0:
        if process.poll() is not None:
            until = min(until, time.monotonic() + _PIPE_S)
        ready, _, _ = select.select(open_pipes, [], [], min(_POLL_S, left_s))
        for pipe in ready:
            data = os.read(pipe, 65536)
            said[pipe].extend(data)
            del said[pipe][:-_MOST_OUTPUT]
            if not data:
                open_pipes.remove(pipe)
        if not ready and process.returncode is not None:
            break
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that has a session of its own, with all that it started there, and wait for it.

    Not for ever: one that waits for a disk or a network file system does not even end when it is killed.
    """
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def _text(data: bytearray) -> str:
    return data.decode("utf-8", "replace")

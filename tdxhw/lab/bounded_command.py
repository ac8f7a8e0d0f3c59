"""Run a program of this machine for a limited time, it and whatever it has started."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_OUTPUT: int = 1 << 20  # [bytes] nobody asks for more, and no program may fill our memory


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
    code: int | None = None
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        end_group(process)
        stdout, stderr = _rest(process)
    except BaseException:
        end_group(process)
        raise
    return Finished(code, _text(stdout), _text(stderr))


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that has a session of its own, with all that it started there, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.wait()


def _rest(process: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
    try:
        return process.communicate(timeout=1)
    except subprocess.TimeoutExpired:  # somebody who left the session still has the pipe
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        return b"", b""


def _text(data: bytes) -> str:
    return data[-_MOST_OUTPUT:].decode("utf-8", "replace")

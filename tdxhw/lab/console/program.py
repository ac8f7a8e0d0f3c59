"""A console that a program prints: ``ipmitool sol activate``, ssh to a console server, anything.

The program's standard input stays open and silent: nothing is ever typed on a console, and a program that is left
behind by a killed tdxhw sees the end of its input.
"""

import os
import select
import subprocess
import threading
import tty
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from tdxhw.lab.bounded_command import end_group
from tdxhw.lab.console.capture import Sink
from tdxhw.lab.errors import ConsoleFailed

_POLL_S: Final = 0.2
_MOST_ERRORS: Final = 4096  # [bytes]


class ProgramSource:
    """Runs `argv`, without a shell; what it writes to standard output is the console."""

    def __init__(
        self, name: str, argv: Sequence[str], environ: Mapping[str, str] | None = None, *, ready: bytes = b"",
        remedy: str = "", refusal: Callable[[str], str] = lambda _said: "", goodbye_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.name = name
        self._argv = list(argv)
        self._environ = environ
        self._ready = ready  # what it says of itself once it is connected; without one it is as soon as it runs
        self._remedy = remedy
        self._refusal = refusal
        self._goodbye_s = goodbye_s  # for taking its leave once its input ends [s]

    def read(self, sink: Sink, stop: threading.Event) -> str:
        """Run it once. ``ConsoleFailed`` if it cannot be started, or says that it never will."""
        # A terminal: what says of itself that it is ready must not keep that in a buffer.
        output, terminal = os.openpty() if self._ready else os.pipe()
        try:
            if self._ready:
                tty.setraw(terminal)
            process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.PIPE, env=self._environ,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            os.close(output)
            raise ConsoleFailed(self._remedy or f"there is no program {self._argv[0]!r}") from None
        except OSError as error:
            os.close(output)
            raise ConsoleFailed(f"cannot run {self._argv[0]!r}: {error.strerror}") from error
        finally:
            os.close(terminal)
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            said = self._copy(process, output, sink, stop)
            process.stdin.close()
            if stop.is_set() and self._goodbye_s:
                _wait(process, self._goodbye_s)
        finally:
            code = process.poll()
            end_group(process)
            process.stderr.close()
            os.close(output)
        if (refusal := self._refusal(said)) and not stop.is_set():
            raise ConsoleFailed(refusal)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"{self._argv[0]} ended with exit code {code}"

    def _copy(self, process: "subprocess.Popen[bytes]", output: int, sink: Sink, stop: threading.Event) -> str:
        assert process.stderr is not None
        errors = process.stderr.fileno()
        pipes = [output, errors]
        said = b""
        head: bytes | None = b"" if self._ready else None  # None: it is connected
        if head is None:
            sink.opened()
        while output in pipes and not stop.is_set():
            ready_pipes = select.select(pipes, [], [], _POLL_S)[0]
            if not ready_pipes and process.poll() is not None:
                break  # what it has left running holds the line open and says nothing
            for pipe in ready_pipes:
                data = _read(pipe)
                if not data:
                    pipes.remove(pipe)
                elif pipe == errors:
                    said = (said + data)[-_MOST_ERRORS:]
                elif head is None:
                    sink.data(data)
                else:
                    head += data
                    before, ready, after = head.partition(self._ready)
                    if ready:
                        head = None
                        sink.opened()
                        sink.data(after.lstrip(b"\r\n"))
                    elif len(before) > _MOST_ERRORS:  # a talkative program that says something else
                        said += before
                        break
        if head:
            said += head
        return said.decode("utf-8", "replace")


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 65536)
    except OSError:  # the end of a terminal
        return b""


def _wait(process: "subprocess.Popen[bytes]", limit_s: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(limit_s)

"""The kernel log over SSH, for a host without a console: what a running kernel says, but not how it dies."""

import threading
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Final

from tdxhw.errors import HarnessError
from tdxhw.lab.connection import Session
from tdxhw.lab.console.capture import Sink
from tdxhw.lab.console.lines import ConsoleLine, clean
from tdxhw.lab.errors import ConnectionLost, ConsoleFailed, HostKeyRefused, LabUnreachable

_LIMIT_S: Final = 7 * 86400.0


class KernelLogSource:
    """Follows /dev/kmsg on the host; after a break it goes on where it was, after a reboot at the beginning."""

    name = "kernel log over ssh"

    def __init__(self, connect: Callable[[], Session]) -> None:
        self._connect = connect
        self._boot_id = "-"
        self._sequence = -1
        self._said = ""

    def read(self, sink: Sink, stop: threading.Event) -> str:
        """Read it over one connection."""
        script = files("tdxhw.lab.remote").joinpath("kernel_log.py").read_text(encoding="utf-8")
        self._said = ""
        try:
            with self._connect() as session:
                argv = ["python3", "-c", script, self._boot_id, str(self._sequence)]
                sink.opened()
                code = session.supervise(
                    argv, limit_s=_LIMIT_S, on_console=lambda text: self._take(text, sink), stop=stop.is_set
                )
        except HostKeyRefused as error:
            raise ConsoleFailed(str(error)) from error
        except (ConnectionLost, LabUnreachable) as error:
            return str(error)
        except HarnessError as error:
            raise ConsoleFailed(str(error)) from error
        if code in (1, 127) and self._sequence < 0 and not stop.is_set():  # may not read it, or has no Python
            raise ConsoleFailed(f"the kernel log cannot be read: {self._said or 'no message'}")
        return f"exit code {code}: {self._said}"

    def _take(self, text: str, sink: Sink) -> None:
        boot_id, _, rest = text.partition(" ")
        sequence, _, rest = rest.partition(" ")
        age_s, _, line = rest.partition(" ")
        try:
            number, age = int(sequence), float(age_s)
        except ValueError:
            self._said = text.strip()[:200]
            return
        self._boot_id, self._sequence = boot_id, number
        sink.line(ConsoleLine(time.time() - age, clean(line.encode())))

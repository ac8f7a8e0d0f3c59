"""Keep what a console says, while something else is going on: a thread, a file and a list.

Whatever goes wrong with the line is written down and tried again; it never disturbs who is capturing.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

from tdxhw.lab.console.lines import ConsoleLine, clean, noted, said
from tdxhw.lab.errors import ConsoleFailed

LIMIT_BYTES: Final = 64 << 20
_LONGEST_LINE: Final = 16384  # [bytes]
_WAITS_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0)  # between tries; the last again and again
_END_S: Final = 15.0
_LASTING_S: Final = 10.0  # a line that breaks sooner and without a word was none


class Sink(Protocol):
    """Takes what a source reads."""

    def opened(self) -> None:
        """Say that the console is connected."""
        ...

    def data(self, data: bytes) -> None:
        """Hand over bytes that have just arrived."""
        ...

    def line(self, line: ConsoleLine) -> None:
        """Hand over a whole line whose time is known."""
        ...


class Source(Protocol):
    """A way to read a console."""

    @property
    def name(self) -> str:
        """What notes and errors call it: ``ipmi-sol bmc-1``."""
        ...

    def read(self, sink: Sink, stop: threading.Event) -> str:
        """Connect, hand everything over until the line breaks or `stop` is set, disconnect; return why it broke.

        Raise ``ConsoleFailed`` if there is no use in trying again.
        """
        ...


class Capture:
    """While entered, keeps a console in the file `path` and in `lines`.

    Up to `limit_bytes` [bytes] are kept, the first three quarters and the end; what is between is counted.
    """

    def __init__(
        self, host: str, source: Source, path: Path, *, limit_bytes: int = LIMIT_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.path = path
        self.problem = ""
        """Why it ended early, or is not connected at its end; nothing if all is well."""
        self.gaps = 0
        """How often the line broke: what was said meanwhile is not known."""
        self._name = f"{host}: console ({source.name})"
        self._source = source
        self._clock = clock
        self._stop = threading.Event()
        self._open = threading.Event()
        self._was_open = False
        self._has_spoken = False  # since it was last tried
        self._is_quiet = False  # it broke at once, again and again: that is noted once
        self._thread = threading.Thread(target=self._capture, name=f"console-{host}", daemon=True)
        self._file: TextIO | None = None
        self._partial = bytearray()
        self._partial_at = 0.0
        self._head: list[ConsoleLine] = []
        self._tail: deque[ConsoleLine] = deque()
        self._head_left = limit_bytes * 3 // 4
        self._tail_left = limit_bytes // 4
        self._lost_lines = 0

    @property
    def lines(self) -> Sequence[ConsoleLine]:
        """What has been said so far. It only grows, until the limit is reached."""
        return self._head if not self._tail else [*self._head, *self._tail]

    def wait_open(self, limit_s: float) -> bool:
        """Wait until the console is connected, at most `limit_s` [s]; return whether it is."""
        return self._open.wait(limit_s)

    @property
    def has_ended(self) -> bool:
        """Whether it has given up before its end: `problem` says why."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def __enter__(self) -> Self:
        """Open the file (``ConsoleFailed`` if that cannot be) and begin; it connects in the background."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConsoleFailed(f"{self._name}: cannot write {self.path}: {error.strerror}") from error
        self._note(f"{self._name}: begins")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect and write what is still to be written."""
        self._stop.set()
        self._thread.join(_END_S)
        self._end_of_line()
        if self._tail:
            if self._lost_lines:
                self._note(f"{self._lost_lines} lines are not kept: the size limit")
            self._write("".join(said(line) for line in self._tail))
        self._note("ends" + (f": {self.problem}" if self.problem else ""))
        try:
            if self._file is not None:
                self._file.close()
        except OSError as failed:
            self._cannot_write(failed)

    # ---- what a source calls ----

    def opened(self) -> None:
        """Remember that the console is connected."""
        if not self._open.is_set() and not self._is_quiet:
            self._note("connected")
        self.problem = ""
        self._was_open = True
        self._open.set()

    def data(self, data: bytes) -> None:
        """Take bytes that have just arrived apart into lines."""
        self._speaks()
        now = self._clock()
        first, *rest = data.split(b"\n")
        self._take(first, now)
        for part in rest:
            self._end_of_line()
            self._take(part, now)

    def line(self, line: ConsoleLine) -> None:
        """Keep one line."""
        self._speaks()
        size = len(line.text) + 1
        if self._head_left > 0:
            self._head_left -= size
            self._head.append(line)
            self._write(said(line))
            if self._head_left <= 0:
                self._note("the size limit is reached: of what follows the end is kept")
            return
        self._tail.append(line)
        self._tail_left -= size
        while self._tail_left < 0:
            self._tail_left += len(self._tail.popleft().text) + 1
            self._lost_lines += 1

    # ---- inside ----

    def _speaks(self) -> None:
        self._has_spoken = True
        if self._is_quiet and self._open.is_set():
            self._is_quiet = False
            self._note("connected")

    def _take(self, data: bytes, now: float) -> None:
        while data:
            if not self._partial:
                self._partial_at = now
            room = _LONGEST_LINE - len(self._partial)
            self._partial += data[:room]
            data = data[room:]
            if len(self._partial) >= _LONGEST_LINE:
                self._end_of_line()

    def _end_of_line(self) -> None:
        if self._partial:
            text = clean(self._partial).rstrip()
            self._partial.clear()
            if text:
                self.line(ConsoleLine(self._partial_at, text))

    def _capture(self) -> None:
        tries = 0
        while not self._stop.is_set():
            self._has_spoken, began = False, time.monotonic()
            try:
                why = self._source.read(self, self._stop)
            except ConsoleFailed as error:
                self.problem = f"{self._name}: {error}"
                self._note(self.problem)
                self._open.clear()
                return
            except Exception as error:  # noqa: BLE001 (a thread that dies tells nobody)
                why = f"{type(error).__name__}: {error}"
            self._end_of_line()
            if self._stop.is_set():
                return
            was_open = self._open.is_set()
            lasted = self._has_spoken or time.monotonic() - began > _LASTING_S
            self._is_quiet = was_open and not lasted
            if was_open and lasted:
                tries = 0
            if was_open and tries == 0:
                self.gaps += 1
            self._open.clear()
            what = "is lost" if self._was_open else "cannot be reached"
            self.problem = f"{self._name} {what}: {why}"
            if tries == 0:  # else the log of a dead BMC is full of it
                self._note(f"{self.problem}; trying again")
            self._stop.wait(_WAITS_S[min(tries, len(_WAITS_S) - 1)])
            tries += 1

    def _note(self, text: str) -> None:
        self._write(noted(self._clock(), text))

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError) as error:
            self._cannot_write(error)

    def _cannot_write(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self.problem = f"{self._name}: cannot write {self.path}: {reason}"

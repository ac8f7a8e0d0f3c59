"""Where a validation is, and the record of how it got there: on the screen and in the output folder."""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tdxhw.validate.states import Event, State, next_state

FILE: Final = "progress.jsonl"


class Course:
    """The state of one validation. Every step of it is on the disk of this machine, if it can be, before the next."""

    def __init__(self, host: str, out: Path | None, say: Callable[[str], None] = lambda _line: None) -> None:
        self.state = State.BASE
        self._host = host
        self._say = say
        self._path = out / FILE if out is not None else None
        self._cannot_write = False

    def move(self, event: Event, detail: str = "") -> None:
        """Take a step, or raise ``OffCourse``."""
        self.state = next_state(self.state, event)
        self._write({"event": event.name, "state": self.state.name, "detail": detail})
        self._say(f"{self._host}: {detail or event.value}")

    def note(self, text: str) -> None:
        """Say something that is no step."""
        self._write({"note": text})
        self._say(f"{self._host}: {text}")

    def keep(self, name: str, lines: Iterable[str]) -> None:
        """Add lines to a file in the output folder: what the host told, and will not tell again."""
        text = "".join(f"{line}\n" for line in lines)
        if self._path is not None and text:
            self._append(self._path.with_name(name), text)

    def _write(self, record: dict[str, str]) -> None:
        if self._path is not None:
            self._append(self._path, json.dumps({"at": round(time.time(), 3), **record}) + "\n")

    def _append(self, path: Path, text: str) -> None:
        """Write it down. If this machine's disk is full, that is no reason to leave the host as it is."""
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._cannot_write:
                self._cannot_write = True
                self._say(f"{path}: cannot write it: {error.strerror}; going on without")

"""Where a validation is, and the record of how it got there: on the screen and in the output folder."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tdxhw.validate.states import Event, State, next_state

FILE: Final = "progress.jsonl"


class Course:
    """The state of one validation. Every step of it is on the disk of this machine before the next begins."""

    def __init__(self, host: str, out: Path | None, say: Callable[[str], None] = lambda _line: None) -> None:
        self.state = State.BASE
        self._host = host
        self._say = say
        self._path = out / FILE if out is not None else None

    def move(self, event: Event, detail: str = "") -> None:
        """Take a step, or raise ``OffCourse``."""
        self.state = next_state(self.state, event)
        self._write({"event": event.name, "state": self.state.name, "detail": detail})
        self._say(f"{self._host}: {detail or event.value}")

    def note(self, text: str) -> None:
        """Say something that is no step."""
        self._write({"note": text})
        self._say(f"{self._host}: {text}")

    def _write(self, record: dict[str, str]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": round(time.time(), 3), **record}) + "\n")
            file.flush()
            os.fsync(file.fileno())

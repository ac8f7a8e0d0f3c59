"""One line of a console, cleaned, and the file format in which a console is kept.

::

    2026-11-23T13:08:01.123Z | [    1.234567] Linux version 7.2.13 …
    2026-11-23T13:09:44.910Z # the console is lost: …; trying again

``|`` is what the machine said, ``#`` what tdxhw has to say about it (start, end, gaps). UTF-8, UTC, one line each.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

# Sequences of a terminal: CSI, OSC and the two-character ones. No two parts of a branch match the same character, so
# that whatever a broken line sends costs linear time.
_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-Z\\^-~])?")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SAID: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) \| (.*)")


@dataclass(frozen=True, slots=True)
class ConsoleLine:
    """What a console said, and when its first byte came."""

    at: float  # [s since 1970], by this machine's clock
    text: str  # without its end, terminal sequences and control characters


def clean(data: bytes | bytearray) -> str:
    """Return the text in `data`: no terminal sequences, no control characters (a tab is a space). Never raises."""
    text = data.decode("utf-8", "replace").replace("\t", " ")
    return _CONTROL.sub("", _ESCAPE.sub("", text))


def said(line: ConsoleLine) -> str:
    """Return the line as it is kept."""
    return f"{_when(line.at)} | {line.text}\n"


def noted(at: float, text: str) -> str:
    """Return a remark of ours as it is kept."""
    return f"{_when(at)} # {text}\n"


def read_log(lines: Iterable[str]) -> Iterator[ConsoleLine]:
    """Yield what the console said; remarks, and lines that are cut off, are left out."""
    for line in lines:
        match = _SAID.match(line)
        if match:
            try:
                at = datetime.fromisoformat(match[1]).timestamp()
            except ValueError:
                continue
            yield ConsoleLine(at, match[2])


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

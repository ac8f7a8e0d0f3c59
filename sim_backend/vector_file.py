"""Files of recorded SEAMCALL vectors: one JSON object a line, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
"""One line of a vector file."""


class ReplayFormatError(Exception):
    """A vector file is malformed or truncated."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")
        self.line = line
        self.why = why


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a `.jsonl` or `.jsonl.gz` file; raise `ReplayFormatError` or ``OSError``."""
    line = 0
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for line, text in enumerate(stream, 1):
                yield _parse(line, text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ReplayFormatError(line + 1, f"the compressed file is damaged or truncated: {error}") from error
    except UnicodeDecodeError as error:
        raise ReplayFormatError(line + 1, f"not UTF-8 text: {error.reason}") from error


def _parse(line: int, text: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ReplayFormatError(line, f"not a JSON object: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("op"), str):
        raise ReplayFormatError(line, 'not an object with an "op"')
    return record

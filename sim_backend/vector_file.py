"""Files of recorded SEAMCALL vectors: one JSON object a line, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
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
    return read_objects(path, {"op": str})


def read_objects(path: Path, required: Mapping[str, type]) -> Iterator[Record]:
    """Yield the objects of a `.jsonl` or `.jsonl.gz` file, each with the `required` keys; errors as `read_records`."""
    line = 0
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for line, text in enumerate(stream, 1):
                yield _parse(line, text, required)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ReplayFormatError(line + 1, f"the compressed file is damaged or truncated: {error}") from error
    except UnicodeDecodeError as error:
        raise ReplayFormatError(line + 1, f"not UTF-8 text: {error.reason}") from error


def _parse(line: int, text: str, required: Mapping[str, type]) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ReplayFormatError(line, f"not a JSON object: {error}") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in required.items()):
        *others, last = (f'"{key}"' for key in required)
        wanted = f"{', '.join(others)} and {last}" if others else f"{'an' if last[1] in 'aeio' else 'a'} {last}"
        raise ReplayFormatError(line, f"not an object with {wanted}")
    return record

"""Recordings as files: JSON lines, compressed where the name ends in ``.gz``.

::

    {"record": "host", "format": "tdxhw-calls-1", "provenance": {...}, "host": {...}, "suites": [...], ...}
    {"obj": "kvm0", "req": "KVM_GET_API_VERSION", "arg": 0, "ret": 12}          one line a call
    {"record": "test", "test": "kvm_device::test_api_version_is_12", "outcome": "passed", "reason": "", "calls": 4}
    {"record": "end", "tests": 14}

A test's line follows its calls. Without the last line a recording is truncated.
"""

import gzip
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tdxhw import __version__
from tdxhw.errors import HarnessError, ReplayInputError
from tdxhw.host import Provenance

FORMAT: Final = "tdxhw-calls-1"


@dataclass(slots=True)
class TestCalls:
    """One test: how it ended and the calls that it made."""

    __test__ = False  # for pytest: no test

    name: str
    """``suite::test[parameters]``, without the host."""
    outcome: str
    reason: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Recording:
    """One side of a comparison."""

    label: str
    """What the user asked for: ``local``, ``sim``, a file name."""
    provenance: Provenance
    host: Mapping[str, Any]
    """What the kernel said of itself (`describe_host`), from which a simulated host can be made."""
    suites: Sequence[str]
    tests: dict[str, TestCalls] = field(default_factory=dict)
    like_other_side: bool = False
    """Whether this simulated host took its profile from the other side."""
    recorded: str = ""
    """When, for one that was read from a file."""


def write(recording: Recording, path: Path) -> None:
    """Write `recording` to `path`. Raise `HarnessError` when that cannot be done."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    head = {
        "record": "host",
        "format": FORMAT,
        "tdxhw": __version__,
        "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": dict(recording.provenance),
        "host": recording.host,
        "suites": list(recording.suites),
    }
    try:
        with opener(path, "wt", encoding="utf-8") as stream:
            for line in _lines(head, recording):
                stream.write(json.dumps(line, separators=(",", ":")) + "\n")
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror or error}") from None


def _lines(head: dict[str, Any], recording: Recording) -> Iterator[dict[str, Any]]:
    yield head
    for test in recording.tests.values():
        yield from test.calls
        ended = {"test": test.name, "outcome": test.outcome, "reason": test.reason}
        yield {"record": "test", **ended, "calls": len(test.calls)}
    yield {"record": "end", "tests": len(recording.tests)}


def read(path: Path) -> Recording:
    """Read a recording. Raise `ReplayInputError`, naming file and line, on one that is malformed or truncated."""
    line = 0
    recording: Recording | None = None
    calls: list[dict[str, Any]] = []
    ended = False
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for line, text in enumerate(stream, 1):
                entry = _parse(path, line, text)
                if ended:
                    raise _malformed(path, line, "more lines after the end")
                if recording is None:
                    recording = _head(path, entry)
                elif entry.get("record") == "test":
                    _add_test(path, line, recording, entry, calls)
                    calls = []
                elif entry.get("record") == "end":
                    ended = True
                    if calls or entry.get("tests") != len(recording.tests):
                        raise _malformed(path, line, "lines are missing before the end")
                else:
                    calls.append(_call(path, line, entry))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _malformed(path, line + 1, f"the compressed file is damaged or truncated: {error}") from None
    except UnicodeDecodeError as error:
        raise _malformed(path, line + 1, f"not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise HarnessError(f"{path}: {error.strerror or error}") from None
    if recording is None:
        raise _malformed(path, 1, "empty")
    if not ended:
        raise _malformed(path, line + 1, "the file is truncated: its last line is missing")
    return recording


def _malformed(path: Path, line: int, why: str) -> ReplayInputError:
    return ReplayInputError(f"{path}:{line}: {why}")


def _parse(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise _malformed(path, line, f"not a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise _malformed(path, line, "not a JSON object")
    return entry


def _head(path: Path, entry: Mapping[str, Any]) -> Recording:
    if entry.get("record") != "host":
        raise _malformed(path, 1, "not a recording of `tdxhw diff --record`: the host's description is missing")
    if entry.get("format") != FORMAT:
        raise _malformed(path, 1, f"format {entry.get('format')!r}, where this tdxhw reads {FORMAT!r}")
    kinds = {"provenance": dict, "host": dict, "suites": list, "recorded": str}
    if not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        raise _malformed(path, 1, f"not all of {', '.join(kinds)} are there")
    return Recording(
        str(path), entry["provenance"], entry["host"], [str(name) for name in entry["suites"]],
        recorded=entry["recorded"],
    )  # fmt: skip


def _add_test(
    path: Path, line: int, recording: Recording, entry: Mapping[str, Any], calls: list[dict[str, Any]]
) -> None:
    if not all(isinstance(entry.get(key), str) for key in ("test", "outcome", "reason")):
        raise _malformed(path, line, 'a test without "test", "outcome" and "reason"')
    if entry.get("calls") != len(calls):
        raise _malformed(path, line, f"{len(calls)} calls before a test that made {entry.get('calls')}")
    name = entry["test"]
    if name in recording.tests:
        raise _malformed(path, line, f"a second {name}")
    recording.tests[name] = TestCalls(name, entry["outcome"], entry["reason"], calls)


def _call(path: Path, line: int, entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry.get("req"), str) or "arg" not in entry or not isinstance(entry.get("out", {}), dict):
        raise _malformed(path, line, 'a call without "req" and "arg", or whose "out" is no object')
    if "ret" not in entry and "errno" not in entry:
        raise _malformed(path, line, 'a call with neither "ret" nor "errno"')
    return entry

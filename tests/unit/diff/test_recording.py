"""The file format: what is written is read back, and what is damaged is refused by file and line."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from tdxhw.diff.recording import Recording, TestCalls, read, write
from tdxhw.errors import HarnessError, ReplayInputError


def recording() -> Recording:
    calls: list[dict[str, Any]] = [
        {"req": "open", "arg": {"path": "/dev/kvm"}, "ret": "kvm0"},
        {"obj": "kvm0", "req": "KVM_CREATE_VM", "arg": 31, "errno": "EINVAL"},
        {"obj": "vcpu0", "req": "KVM_GET_REGS", "arg": {}, "ret": 0, "out": {"rax": (1 << 64) - 1}},
    ]
    tests = {"s::a": TestCalls("s::a", "passed", "", calls), "s::b": TestCalls("s::b", "skipped", "needs tdx")}
    return Recording("local", {"kernel": "6.18"}, {"kernel": "6.18", "caps_system": {"0": 1}}, ["s"], tests)


@pytest.mark.parametrize("name", ["calls.jsonl", "calls.jsonl.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(recording(), path)

    found = read(path)

    assert (found.tests, found.provenance, found.host, found.suites) == (
        recording().tests, recording().provenance, recording().host, ["s"],
    )  # fmt: skip
    assert found.label == str(path)
    assert found.recorded.endswith("Z")


def damaged(tmp_path: Path, line: int, text: str | None) -> Path:
    """Return a recording whose `line` (from 1) is `text`, or that ends before it."""
    path = tmp_path / "calls.jsonl"
    write(recording(), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[: line - 1] if text is None else [*lines[: line - 1], text, *lines[line:]]) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "{", r":1: not a JSON object"),
        (1, "[]", r":1: not a JSON object"),
        (1, '{"scenario": "x"}', r":1: not a recording of `tdxhw diff --record`"),
        (1, '{"record": "host", "format": "tdxhw-calls-9"}', r":1: format 'tdxhw-calls-9', where"),
        (1, '{"record": "host", "format": "tdxhw-calls-1", "host": 5}', r":1: not all of"),
        (2, '{"req": 5}', r":2: a call without"),
        (3, '{"req": "KVM_RUN", "arg": 0}', r":3: a call with neither"),
        (3, '{"req": "KVM_RUN", "arg": 0, "ret": 0, "out": []}', r":3: a call without"),
        (5, '{"record": "test", "test": "s::a"}', r':5: a test without "test", "outcome" and "reason"'),
        (5, '{"record": "test", "test": "s::a", "outcome": "passed", "reason": "", "calls": 9}', r":5: 3 calls before"),
        (6, '{"record": "test", "test": "s::a", "outcome": "passed", "reason": "", "calls": 0}', r":6: a second s::a"),
        (7, '{"record": "end", "tests": 3}', r":7: lines are missing"),
        (7, None, r":7: the file is truncated"),
        (1, None, r":1: not a JSON object"),
    ],
)
def test_damage_is_named_by_file_and_line(tmp_path: Path, line: int, text: str | None, message: str) -> None:
    path = damaged(tmp_path, line, text)

    with pytest.raises(ReplayInputError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl.gz"
    write(recording(), path)
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(ReplayInputError, match="damaged or truncated"):
        read(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xff\xfe\x00"))

    with pytest.raises(ReplayInputError, match=":1: not UTF-8 text"):
        read(path)


def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"cannot write .*: No such file"):
        write(recording(), tmp_path / "no" / "calls.jsonl")

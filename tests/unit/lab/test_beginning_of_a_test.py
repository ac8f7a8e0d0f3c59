"""On real machines the report log names a test before its first line runs, and that is on the disk."""

import json
import os
from pathlib import Path

import pytest

from tdxhw.console import SilentDisplay
from tdxhw.runner import RunOptions, run_on
from tests.unit.tdxhw.fake_host import MAINLINE_CAPS, FakeHost, fake_backend

SUITE = """
import pathlib, pytest

LOG = pathlib.Path(__file__).with_name("log.jsonl")

@pytest.fixture
def device(): LOG.with_name("seen").write_text(LOG.read_text())

def test_it(device): pass
"""


def test_the_set_up_of_a_test_finds_its_name_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_own.py").write_text(SUITE)
    synced: list[str] = []
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(os, "fsync", lambda _fd: synced.append(log.read_text()))

    record = run_on(
        fake_backend(FakeHost("one", MAINLINE_CAPS)), [tmp_path / "test_own.py"], RunOptions(report_log=log),
        SilentDisplay(),
    )  # fmt: skip

    assert record.exit_code == 0
    last = json.loads((tmp_path / "seen").read_text().splitlines()[-1])
    assert (last["$report_type"], last["nodeid"]) == ("TestStart", "test_own.py::test_it")
    assert synced == [(tmp_path / "seen").read_text()]

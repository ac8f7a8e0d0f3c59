"""What goes wrong on the machine that validates: no reason to leave the host as it is, nor for a verdict."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.validate.cli import remember
from tdxhw.validate.outcome import Outcome, Tried
from tdxhw.validate.signals import Signals
from tdxhw.validate.validation import Validation
from tdxhw.validate.verdict import Verdict
from tests.unit.validate.simulated_debian import MEMORY
from tests.unit.validate.simulated_lab import Kernel, SimulatedLab, plan_for
from tests.unit.validate.test_validate_command import arguments, files
from tests.unit.validate.test_validation import assert_as_it_was, validate

__all__ = ["files"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def test_a_full_disk_is_told_once_and_changes_neither_the_verdict_nor_the_way_back(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    before = lab.debian.snapshot()
    plan = plan_for(folder)
    (plan.out / "progress.jsonl").symlink_to("/dev/full")
    said: list[str] = []
    outcome = Validation(plan, lab, said.append).run()
    assert outcome.verdict is Verdict.GOOD, outcome.problems
    assert len([line for line in said if f"progress.jsonl: cannot write it: {os.strerror(errno.ENOSPC)}" in line]) == 1
    assert_as_it_was(lab, before, said)


@pytest.mark.parametrize("at", range(0, 30, 3))
def test_a_mistake_of_ours_is_no_verdict_and_says_how_to_go_on(folder: Path, at: int) -> None:
    lab = SimulatedLab(folder / "host")
    original = lab.happens

    def happens() -> bool:
        if lab.operations == at:
            lab.operations += 1
            raise ValueError("a mistake")
        return original()

    lab.happens = happens  # type: ignore[method-assign]
    outcome, _ = validate(lab, folder)
    assert lab.operations > at, "a validation has that many"
    assert outcome.exit_code == 125
    assert "internal error: ValueError: a mistake" in outcome.line
    assert "Traceback" in (folder / "out/internal-error.txt").read_text()
    if lab.debian.file("var/lib/tdxhw/validate").exists():
        assert any("--recover" in problem for problem in outcome.problems), outcome.problems


def test_a_mistake_of_ours_before_anything_began_is_no_verdict(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_candidate(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr("tdxhw.validate.candidate.read_candidate", read_candidate)
    assert main(arguments(files)) == 125
    assert capsys.readouterr().err.splitlines()[-1].startswith("tdxhw: internal error: ValueError: a mistake")


def test_a_reader_that_goes_away_costs_no_verdict(files: Path) -> None:
    (files / "labs/vm.yaml").write_text("host:\n  name: vm\n  ssh: ssh://root@127.0.0.1:1\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from tdxhw.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, *arguments(files)], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 125, done.stderr
    assert (files / "out/outcome.json").exists()


@pytest.mark.usefixtures("hangups_are_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_validation_by_way_of_its_way_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Signals(lambda _line: None):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(lambda _line: None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_middle_of_a_line_is_answered_without_harm() -> None:
    def say(_line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with Signals(say) as signals:
        signals.shield("rolling back", insisted=False)
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_the_host_told_about_a_failed_boot_is_kept(folder: Path) -> None:
    lab = SimulatedLab(folder / "host", kernel=Kernel.NO_NETWORK)
    validate(lab, folder)
    assert "unconfirmed" in (folder / "out/guard.log").read_text()


def test_a_history_that_fails_in_whatever_way_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_history(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("tdxhw.history.cli.open_history", open_history)
    plan = plan_for(tmp_path)
    outcome = Outcome("vm", "7.2", plan.base, tried=[Tried({}, [plan.base])])
    remember(plan, outcome, None)
    assert capsys.readouterr().err.endswith("not in the history: database is locked\n")

"""Several hosts at once: who runs what, and what is said when one of them breaks in a way that nobody foresaw."""

from pathlib import Path

import pytest

from tdxhw.errors import HarnessError
from tdxhw.lab import fleet
from tdxhw.lab.connection import Session
from tdxhw.lab.host_run import HostRun, Wish
from tdxhw.report.read import read
from tdxhw.report.results import Status

LABS = """\
hosts:
- {name: left, ssh: root@left, labels: [pair]}
- {name: right, ssh: root@right, labels: [pair]}
"""


@pytest.fixture
def labs(tmp_path: Path) -> Path:
    (tmp_path / "labs").mkdir()
    (tmp_path / "labs/pair.yaml").write_text(LABS)
    return tmp_path / "labs"


def test_a_host_for_which_no_suite_is_left_runs_none(labs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(HostRun, "run", lambda self: ran.update({self.host.name: self.wish.suites}))
    said: list[str] = []
    fleet.run_on_lab("label=pair", Wish(suites=("kvm_device",)), on_line=said.append, labs=labs)
    assert ran == {"left": ("kvm_device",)}, "a wish without suites is one for all of them"
    assert said == ["right: not needed: there are fewer suites than hosts"]


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Wish(suites=("kvm_devise",)), "kvm_devise"),
        (Wish(suites=("nowhere/test_x.py",)), "no file nowhere/test_x.py"),
        (Wish(keyword="(vcpu"), r"-k '\(vcpu': pytest says: .*expected right parenthesis"),
        (Wish(keyword="-x"), "-k '-x': pytest says: .*expected one argument"),
    ],
)
def test_a_selection_that_means_nothing_is_told_before_a_host_is_asked(
    labs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], wish: Wish, told: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(HostRun, "run", lambda self: asked.append(self.host.name))
    with pytest.raises(HarnessError, match=told) as error:
        fleet.run_on_lab("all", wish, labs=labs)
    assert "\n" not in str(error.value)
    assert asked == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keyword", ["vcpu or not (msr and test_x[4])", "é", "Td::x", ""])
def test_an_expression_that_pytest_understands_is_let_through(
    labs: Path, monkeypatch: pytest.MonkeyPatch, keyword: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(HostRun, "run", lambda self: asked.append(self.wish.keyword))
    fleet.run_on_lab("left", Wish(suites=("kvm_device",), keyword=keyword), labs=labs)
    assert asked == [keyword]


def test_a_run_that_breaks_in_a_way_nobody_foresaw_is_not_taken_for_success(
    labs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: HostRun) -> Session:
        raise ValueError("what is this")

    monkeypatch.setattr(HostRun, "_connect", broken)
    done = fleet.run_on_lab("left", Wish(), labs=labs)
    assert done.problems == ("left: ValueError: what is this",)
    assert done.exit_code == 2
    assert [(one.host, one.status) for one in done.results.results] == [("left", Status.MISS)]


def full_of_files(_self: HostRun) -> Session:
    raise OSError(28, "No space left on device")


def test_a_full_disk_of_ours_is_a_problem_too(labs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: HostRun, _record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HostRun, "_connect", full_of_files)
    monkeypatch.setattr(HostRun, "_write", full)
    done = fleet.run_on_lab("left", Wish(), labs=labs)
    assert done.exit_code == 2
    assert done.results.results == ()


def test_what_is_written_of_a_broken_run_can_be_read(labs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Session] = {}
    monkeypatch.setattr(HostRun, "_connect", lambda _self: answers["no such key"])
    done = fleet.run_on_lab("left", Wish(), labs=labs)
    path = labs / "log.jsonl"
    path.write_text(done.log)
    assert "KeyError" in read(path).results[0].message

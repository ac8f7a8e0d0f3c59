"""Which suites a validation runs, and what of a baseline is about them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tdxhw.lab.host_run import HostRun, Wish
from tdxhw.report.results import Results, Status
from tdxhw.validate import suites as suites_module
from tdxhw.validate.suites import Suites, of_suites
from tests.unit.report.samples import result


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "test_one.py").touch()
    (tmp_path / "mine" / "deep" / "test_two.py").touch()
    (tmp_path / "test_alone.py").touch()
    return tmp_path


def suites(*given: str) -> Suites:
    nothing: Any = None
    return Suites(
        nothing, Path(), None, nothing, Wish(given), Path(), "", 1, nothing, print, nothing, nothing
    )  # fmt: skip


def test_a_test_runs_again_from_where_the_user_said_it_is(own: Path) -> None:
    """Else the host is asked for a suite of that name, has none, and a regression ends as inconclusive."""
    folder, file = str(own / "mine"), str(own / "test_alone.py")
    again = suites("kvm_device", folder, file)._given(("two", "one", "alone", "kvm_device"))
    assert again == (folder, file, "kvm_device")
    assert suites()._given(("kvm_device",)) == ("kvm_device",)


def test_only_what_a_baseline_says_about_the_suites_that_were_asked_for_counts(own: Path) -> None:
    names = ("one", "two", "alone", "kvm_device", "td_memory")
    base = Results(tuple(result(suite=name, status=Status.PASS) for name in names), ("base.jsonl",), ("a note",))
    kept = of_suites(base, [own / "mine", Path("/anywhere/test_kvm_device.py")])
    assert [one.suite for one in kept.results] == ["one", "two", "kvm_device"]
    assert kept.notes == ("a note", "2 results of the baseline are of suites that were not asked for")
    assert of_suites(base, [Path(f"test_{name}.py") for name in names]).notes == ("a note",)


def test_the_kernel_on_trial_gets_marks_and_the_lease_is_the_validation_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[HostRun] = []

    def run_all(given: Sequence[HostRun]) -> bool:
        runs.extend(given)
        return False

    monkeypatch.setattr(suites_module, "run_all", run_all)
    one = suites("kvm_device")
    one.out = tmp_path
    one.run(Results(()), "results", [])
    assert [(run.marks, run.held, run.wish.suites) for run in runs] == [(True, one.lease, ("kvm_device",))]

"""Comparing runs: like with like, flakes are no regressions, and the exit code says it."""

import json
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.report import json_lines
from tdxhw.report.cli import compare as compare_command
from tdxhw.report.compare import CHANGES, Change, _State, compare
from tdxhw.report.errors import ReportError
from tdxhw.report.results import Result, Results, Status
from tests.unit.report.samples import GNR, SIM, SPR, result

PASS, FAIL, ERROR, MISS, SKIP = Status.PASS, Status.FAIL, Status.ERROR, Status.MISS, Status.SKIP


def run(*statuses: Status, host: str = "spr-01", provenance: dict[str, str] | None = None) -> Results:
    return Results(tuple(result(status=status, host=host, provenance=provenance or SPR) for status in statuses))


def only_change(base: Results, new: Results) -> Change:
    (entry,) = compare(base, new).entries
    return entry.change


CASES = {
    "passes_as_before": ((PASS,), (PASS,), Change.UNCHANGED),
    "fails_now": ((PASS,), (FAIL,), Change.REGRESSION),
    "breaks_now": ((PASS,), (ERROR,), Change.REGRESSION),
    "fails_on_every_retry": ((PASS,), (FAIL, FAIL, FAIL), Change.REGRESSION),
    "passes_on_a_retry": ((PASS,), (FAIL, PASS), Change.FLAKY),
    "was_flaky_before": ((FAIL, PASS), (FAIL,), Change.FLAKY),
    "was_flaky_and_passed_once": ((FAIL, PASS), (PASS,), Change.UNCHANGED),
    "works_now": ((FAIL,), (PASS,), Change.FIX),
    "fails_as_before": ((FAIL,), (ERROR,), Change.STILL_FAILING),
    "host_was_lost": ((PASS,), (MISS,), Change.LOST),
    "host_was_lost_at_first": ((PASS,), (MISS, PASS), Change.UNCHANGED),
    "host_was_lost_before_it_failed": ((PASS,), (MISS, FAIL), Change.REGRESSION),
    "capability_is_gone": ((PASS,), (SKIP,), Change.LOST),
    "capability_came": ((SKIP,), (PASS,), Change.NEW),
    "capability_came_and_fails": ((SKIP,), (FAIL,), Change.NEW_FAILURE),
    "expected_failure": ((Status.XFAIL,), (Status.XFAIL,), Change.UNCHANGED),
}


@pytest.mark.parametrize("case", CASES)
def test_a_test_that(case: str) -> None:
    base, new, change = CASES[case]
    assert only_change(run(*base), run(*new)) is change


def test_every_pair_of_states_has_its_change() -> None:
    pairs = set(product(_State, _State)) - {(_State.ABSENT, _State.ABSENT)}
    assert set(CHANGES) == pairs


def test_tests_that_came_and_went_are_named() -> None:
    base = Results((result(), result(test="test_old")))
    new = Results((result(), result(test="test_new"), result(test="test_new_and_bad", status=FAIL)))
    changes = {entry.name: entry.change for entry in compare(base, new).entries}
    assert changes == {
        "lifecycle::test_td_is_created": Change.UNCHANGED,
        "lifecycle::test_old": Change.GONE,
        "lifecycle::test_new": Change.NEW,
        "lifecycle::test_new_and_bad": Change.NEW_FAILURE,
    }


def test_the_simulator_is_not_compared_with_hardware_without_saying_so() -> None:
    simulated, hardware = run(PASS, provenance=SIM, host="mainline"), run(FAIL)
    with pytest.raises(ReportError, match="BASE is all simulator and NEW is all hardware"):
        compare(simulated, hardware)

    across = compare(simulated, hardware, across_backends=True)
    assert across.has_regressed
    assert "BASE is simulator, NEW is hardware" in across.notes


def test_a_simulated_pass_does_not_hide_that_hardware_lost_a_test() -> None:
    base = Results((*run(PASS).results, *run(PASS, provenance=SIM, host="mainline").results))
    new = Results((*run(FAIL).results, *run(PASS, provenance=SIM, host="mainline").results))
    assert {(entry.host, entry.change) for entry in compare(base, new).entries} == {
        ("spr-01", Change.REGRESSION),
        ("mainline", Change.UNCHANGED),
    }


def test_a_backend_that_only_one_side_has_is_left_out_and_noted() -> None:
    base = Results((*run(PASS).results, *run(PASS, provenance=SIM, host="mainline").results))
    comparison = compare(base, run(PASS))
    assert comparison.counts == {"unchanged": 1}
    assert comparison.notes == ("only BASE has results from simulator: not compared",)


def test_dialects_are_different_tests() -> None:
    comparison = compare(run(PASS, provenance=SPR | {"dialect": "v17"}), run(FAIL))
    assert comparison.counts == {"new, failing": 1, "gone": 1}


def test_a_host_that_both_sides_have_is_compared_with_itself() -> None:
    base = Results((*run(PASS).results, *run(FAIL, host="gnr-01", provenance=GNR).results))
    new = Results((*run(FAIL).results, *run(PASS, host="gnr-01", provenance=GNR).results))
    assert {entry.host: entry.change for entry in compare(base, new).entries} == {
        "spr-01": Change.REGRESSION,
        "gnr-01": Change.FIX,
    }


def test_hosts_that_disagree_are_no_regression() -> None:
    base = run(PASS, host="old-01")
    new = Results((*run(PASS).results, *run(FAIL, host="gnr-01", provenance=GNR).results))
    assert only_change(base, new) is Change.FLAKY


def test_results_of_hosts_without_a_counterpart_are_left_out_and_noted() -> None:
    new = Results((*run(PASS).results, *run(FAIL, host="gnr-01", provenance=GNR).results))
    comparison = compare(run(PASS), new)
    assert comparison.counts == {"unchanged": 1}
    assert comparison.notes == ("1 results are from hosts that only one side has: not compared",)


def test_what_else_differs_is_shown() -> None:
    comparison = compare(run(PASS), run(PASS, provenance=SPR | {"kernel": "7.3.0", "tdx_module": "1.5.25"}))
    assert comparison.conditions == {
        "kernel": (("6.19.0-3-generic",), ("7.3.0",)),
        "tdx_module": (("1.5.24",), ("1.5.25",)),
    }


def test_another_build_of_the_same_release_is_shown() -> None:
    before, after = SPR | {"build_id": "aa"}, SPR | {"build_id": "bb"}
    assert compare(run(PASS, provenance=before), run(PASS, provenance=after)).conditions == {
        "build_id": (("aa",), ("bb",))
    }
    newer = after | {"kernel": "7.3.0"}  # whose build id is another of course
    assert set(compare(run(PASS, provenance=before), run(PASS, provenance=newer)).conditions) == {"kernel"}


def test_a_test_that_became_much_slower_is_told() -> None:
    base, new = Results((result(duration_s=0.5),)), Results((result(duration_s=5.0),))
    assert compare(base, new).entries[0].slowdown == pytest.approx(10)
    quick = Results((result(duration_s=0.001),)), Results((result(duration_s=0.01),))
    assert compare(*quick).entries[0].slowdown is None, "milliseconds are noise"


RUNS = st.lists(
    st.builds(
        result, test=st.sampled_from(["test_a", "test_b"]), host=st.sampled_from(["spr-01", "gnr-01"]),
        status=st.sampled_from(Status), provenance=st.sampled_from([SPR, GNR]),
    ),
    min_size=1, max_size=8,
).map(lambda results: Results(tuple(results)))  # fmt: skip


@given(RUNS)
def test_a_run_compared_with_itself_has_no_regression_and_no_change(results: Results) -> None:
    allowed = {Change.UNCHANGED, Change.STILL_FAILING, Change.FLAKY}
    assert {entry.change for entry in compare(results, results).entries} <= allowed


@given(RUNS, RUNS)
def test_no_result_is_compared_twice_or_forgotten(base: Results, new: Results) -> None:
    comparison = compare(base, new)
    seen: list[Result] = [one for entry in comparison.entries for one in (*entry.base, *entry.new)]
    left_out = next((int(note.split()[0]) for note in comparison.notes if "not compared" in note), 0)
    assert len(seen) + left_out == len(base.results) + len(new.results)


@given(RUNS, RUNS)
def test_a_passing_retry_never_makes_a_regression(base: Results, new: Results) -> None:
    keys = {(one.test, one.host) for one in new.results}
    retried = Results((*new.results, *(result(test=test, host=host) for test, host in keys)))
    assert not compare(base, retried).has_regressed


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    runs = {"pass": run(PASS), "fail": run(FAIL), "sim": run(PASS, provenance=SIM, host="mainline"), "skip": run(SKIP)}
    for name, results in runs.items():
        (tmp_path / name).write_text(json_lines.render(results))
    (tmp_path / "none").write_text('{"$report_type": "SessionStart"}\n{"$report_type": "SessionFinish"}\n')
    return {path.name: str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("base", "new", "options", "code", "last"),
    [
        ("pass", "pass", [], 0, "no regression: 1 unchanged"),
        ("pass", "fail", [], 1, "regressed: 1 regression"),
        ("fail", "pass", [], 0, "no regression: 1 fixed"),
        ("pass", "skip", [], 0, "no regression: 1 no longer run"),
        ("pass", "skip", ["--strict"], 1, "no regression: 1 no longer run"),
        ("sim", "fail", ["--across-backends"], 1, "regressed: 1 regression"),
    ],
)
def test_the_exit_code_is_1_on_a_regression(
    files: dict[str, str], base: str, new: str, options: list[str], code: int, last: str
) -> None:
    done = CliRunner().invoke(compare_command, [files[base], files[new], *options])
    assert (done.exit_code, done.output.splitlines()[-1]) == (code, last)
    document = json.loads(CliRunner().invoke(compare_command, [files[base], files[new], *options, "--json"]).output)
    assert document["verdict"] == ("worse" if code else "no-regression")


def test_a_retry_given_with_the_run_saves_it(files: dict[str, str]) -> None:
    done = CliRunner().invoke(compare_command, [files["pass"], files["fail"], "--also-new", files["pass"]])
    assert done.exit_code == 0
    assert "flaky" in done.output


def test_a_comparison_of_no_common_test_is_an_error(files: dict[str, str]) -> None:
    other = Path(files["pass"]).with_name("other")
    other.write_text(json_lines.render(Results((result(test="another"),))))
    done = CliRunner().invoke(compare_command, [files["pass"], str(other)])
    assert isinstance(done.exception, ReportError)
    assert "nothing was compared" in str(done.exception)


def test_in_a_pipe_a_long_name_is_whole(files: dict[str, str], tmp_path: Path) -> None:
    name = "test_" + "with_a_long_name_" * 8 + "[with-a-long-parameter]"
    (tmp_path / "long").write_text(json_lines.render(Results((result(), result(test=name)))))
    assert name in CliRunner().invoke(compare_command, [files["pass"], str(tmp_path / "long")]).output


@pytest.mark.parametrize(("base", "new"), [("sim", "pass"), ("none", "pass"), ("pass", "none")])
def test_what_cannot_be_compared_is_an_error(files: dict[str, str], base: str, new: str) -> None:
    done = CliRunner().invoke(compare_command, [files[base], files[new]])
    assert isinstance(done.exception, ReportError)


def test_the_comparison_goes_into_the_step_summary(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    CliRunner().invoke(compare_command, [files["pass"], files["fail"], "--github"])
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("## tdxhw compare: ❌ 1 regressed")
    assert "| regression | lifecycle::test\\_td\\_is\\_created | mainline spr-01 |" in text


def test_what_a_guest_printed_does_not_reach_the_terminal(tmp_path: Path) -> None:
    escape = "\x1b[2J\x1b]0;title\x07"
    given = []
    for name, status in (("base", Status.PASS), ("new", Status.FAIL)):
        provenance = {"kernel": f"{name}{escape}", "dialect": escape}
        one = result(test=f"test_x{escape}", host=f"h{escape}", status=status, provenance=provenance, message=escape)
        given.append(tmp_path / f"{name}.jsonl")
        given[-1].write_text(json_lines.render(Results((one,))))
    said = CliRunner().invoke(compare_command, [str(path) for path in given]).output
    assert "regression  lifecycle::test_x\\x1b[2J" in said
    assert not {"\x1b", "\x07"} & set(said)

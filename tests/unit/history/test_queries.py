"""Questions to the history and their answers. Runs on PostgreSQL in tests/lab, too."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tdxhw.history import queries
from tdxhw.history.database import Database
from tdxhw.history.errors import HistoryError
from tdxhw.history.queries import EnvironmentLine, Wanted
from tdxhw.history.store import History, RunRecord
from tdxhw.report.results import Results, Status
from tdxhw.report.trends import KernelPoint
from tests.unit.report.samples import GNR, SIM, SPR, every_kind, result

PASS, FAIL = Status.PASS, Status.FAIL
DAY_S = 86400.0
T0 = 1.76e9
KERNELS = ("6.17.0", "6.18.0-rc1", "6.18.0")


def days() -> list[Results]:
    """Three days, each with a kernel of its own: test_a passes, test_b fails on the second, test_c is flaky there."""
    runs = []
    for day, kernel in enumerate(KERNELS):
        here = SPR | {"kernel": kernel}
        bad = FAIL if day == 1 else PASS
        runs.append(
            Results(
                (
                    result(test="test_a", started=T0 + day * DAY_S, duration_s=1.0 + day, provenance=here),
                    result(test="test_b[1]", started=T0 + day * DAY_S + 1, status=bad, provenance=here,
                           message="EIO" if day == 1 else ""),
                    result(test="test_c", started=T0 + day * DAY_S + 2, status=bad, provenance=here),
                    result(test="test_c", started=T0 + day * DAY_S + 3, provenance=here),
                    result(suite="mmu", test="test_a", started=T0 + day * DAY_S + 4, host="gnr-01",
                           provenance=GNR | {"kernel": kernel}),
                )
            )
        )  # fmt: skip
    return runs


@pytest.fixture
def database(where: str) -> Iterator[Database]:
    with History.open(where) as history:
        for run in days():
            history.add(RunRecord(), run)
        simulated = result(test="test_a", host="mainline", provenance=SIM, started=T0 + 9 * DAY_S)
        history.add(RunRecord("validate", verdict="GOOD", line="GOOD: x"), Results((simulated,), ("sim.jsonl",)))
    opened = Database.open(where)
    yield opened
    opened.close()


def test_runs_come_newest_first_and_in_numbers(database: Database) -> None:
    newest, *rest = queries.runs(database)
    assert (newest.tool, newest.verdict, newest.sources) == ("validate", "GOOD", ("sim.jsonl",))
    assert [run.kernels for run in rest] == [("6.18.0",), ("6.18.0-rc1",), ("6.17.0",)]
    assert [run.counts for run in rest] == [{"PASS": 5}, {"FAIL": 2, "PASS": 3}, {"PASS": 5}]
    assert rest[0].hosts == ("gnr-01", "spr-01")
    assert rest[0].modules == ("1.5.24", "2.0.08")
    assert [run.id for run in queries.runs(database, limit=2)] == [newest.id, rest[0].id]


def test_runs_of_a_kernel_a_host_and_a_time(database: Database) -> None:
    assert [run.kernels for run in queries.runs(database, Wanted(kernel="6.18*"))] == [("6.18.0",), ("6.18.0-rc1",)]
    assert len(queries.runs(database, Wanted(host="gnr-01"))) == 3
    assert [run.started for run in queries.runs(database, Wanted(since=T0 + 2 * DAY_S, host="spr-01"))] == [
        T0 + 2 * DAY_S
    ]


def test_a_test_over_time(database: Database) -> None:
    lines = queries.of_test(database, Wanted(test="lifecycle::test_b[1]"))
    assert [(line.kernel, line.status, line.message) for line in lines] == [
        ("6.18.0", "PASS", ""),
        ("6.18.0-rc1", "FAIL", "EIO"),
        ("6.17.0", "PASS", ""),
    ]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("lifecycle::test_a", {"lifecycle::test_a"}),
        ("test_a", {"lifecycle::test_a", "mmu::test_a"}),
        ("test_b", {"lifecycle::test_b[1]"}),
        ("test_b[1]", {"lifecycle::test_b[1]"}),
        ("lifecycle::test_b", {"lifecycle::test_b[1]"}),
        ("mmu::*", {"mmu::test_a"}),
        ("test_?", {"lifecycle::test_a", "mmu::test_a", "lifecycle::test_c"}),
    ],
)
def test_a_test_may_be_named_in_part(database: Database, asked: str, found: set[str]) -> None:
    assert {line.test for line in queries.of_test(database, Wanted(test=asked))} == found


def test_what_nobody_has_heard_of_is_an_error_with_a_guess(database: Database) -> None:
    with pytest.raises(HistoryError, match=r"no test 'test_aa'; did you mean 'test_a'\?"):
        queries.of_test(database, Wanted(test="test_aa"))
    with pytest.raises(HistoryError, match=r"no kernel '6\.18\.1'; did you mean '6\.18\.0'\?"):
        queries.environments(database, Wanted(kernel="6.18.1"))
    with pytest.raises(HistoryError, match=r"no host 'x'; there are: gnr-01, mainline, spr-01"):
        queries.environments(database, Wanted(host="x"))
    with pytest.raises(HistoryError, match=r"no module '9\*'; there are: 1\.5\.24, 2\.0\.08, mainline-host"):
        queries.environments(database, Wanted(module="9*"))


def test_the_simulator_can_be_left_out(database: Database) -> None:
    everything, hardware, simulated = (
        queries.of_test(database, Wanted(test="lifecycle::test_a", simulated=which)) for which in (None, False, True)
    )
    assert (len(everything), len(hardware), len(simulated)) == (4, 3, 1)
    assert not any(line.simulated for line in hardware)


def test_a_kernel_in_numbers(database: Database) -> None:
    assert queries.environments(database, Wanted(kernel="6.18.0-rc1")) == [
        EnvironmentLine("6.18.0-rc1", "1.5.24", "spr-01", simulated=False, counts={"FAIL": 2, "PASS": 2},
                        duration_s=2.75),
        EnvironmentLine("6.18.0-rc1", "2.0.08", "gnr-01", simulated=False, counts={"PASS": 1}, duration_s=0.25),
    ]  # fmt: skip


def test_a_host_and_a_module_in_numbers(database: Database) -> None:
    assert [line.kernel for line in queries.environments(database, Wanted(host="gnr-01"))] == list(KERNELS)
    since = queries.environments(database, Wanted(module="1.5.24", since=T0 + DAY_S))
    assert [(line.kernel, sum(line.counts.values())) for line in since] == [("6.18.0-rc1", 4), ("6.18.0", 4)]


def test_failing_tests_with_their_latest_message(database: Database) -> None:
    found = {line.test: line for line in queries.failing(database, Wanted(host="spr-01"))}
    assert set(found) == {"lifecycle::test_b[1]", "lifecycle::test_c"}
    line = found["lifecycle::test_b[1]"]
    assert (line.kernel, line.passed, line.failed, line.message) == ("6.18.0-rc1", 0, 1, "EIO")


def test_flaky_is_what_passed_and_failed_under_the_same_conditions(database: Database) -> None:
    (line,) = queries.failing(database, Wanted(), only_flaky=True)
    assert (line.test, line.kernel, line.passed, line.failed) == ("lifecycle::test_c", "6.18.0-rc1", 1, 1)
    assert queries.failing(database, Wanted(since=T0 + 2 * DAY_S), only_flaky=True) == []


def test_runs_can_be_narrowed_like_everything_else(database: Database) -> None:
    assert [line.id for line in queries.runs(database, Wanted(simulated=True))] == [4]
    assert [line.id for line in queries.runs(database, Wanted(simulated=False))] == [3, 2, 1]
    assert [line.id for line in queries.runs(database, Wanted(test="test_c", kernel="6.18*"))] == [3, 2]


SINCE = Wanted(since=T0 + DAY_S)


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (lambda database: len(queries.runs(database, SINCE)), 3),
        (lambda database: len(queries.of_test(database, replace(SINCE, test="test_c"))), 4),
        (lambda database: sum(sum(one.counts.values()) for one in queries.environments(database, SINCE)), 11),
        (lambda database: len(queries.failing(database, SINCE)), 2),
        (lambda database: len(queries.failing(database, SINCE, only_flaky=True)), 1),
        (lambda database: len(list(queries.export(database, SINCE))), 11),
    ],
    ids=["runs", "test", "environments", "failing", "flaky", "export"],
)
def test_every_question_can_be_about_the_runs_since_then(
    database: Database, ask: Callable[[Database], int], found: int
) -> None:
    assert ask(database) == found


def test_a_kernel_that_was_mended_and_built_again_has_no_flaky_test(where: str) -> None:
    broken, mended = (SPR | {"kernel": "7.2.13-mine", "build_id": build} for build in ("aa", "bb"))
    with History.open(where) as history:
        history.add(RunRecord(), Results((result(status=FAIL, provenance=broken, started=T0),)))
        history.add(RunRecord(), Results((result(provenance=mended, started=T0 + 1),)))
        assert queries.failing(history.database, Wanted(), only_flaky=True) == []
        assert len(queries.failing(history.database, Wanted(kernel="7.2.13-mine"))) == 1


def test_a_test_over_kernels(database: Database) -> None:
    names = ["lifecycle::test_a", "lifecycle::test_b[1]", "lifecycle::test_c"]
    points = queries.over_kernels(database, names, hosts=["spr-01"], simulated=False)
    assert list(points) == list(KERNELS)
    assert points["6.18.0-rc1"] == {
        "lifecycle::test_a": KernelPoint(1, 0, 2.0),
        "lifecycle::test_b[1]": KernelPoint(0, 1, None),
        "lifecycle::test_c": KernelPoint(1, 1, 0.25),
    }
    # That host ran other tests last, with each of the kernels.
    assert list(queries.over_kernels(database, ["mmu::test_a"], hosts=None, simulated=False)) == list(KERNELS)
    latest = queries.over_kernels(database, names, hosts=["spr-01"], simulated=False, kernels=2)
    assert list(latest) == list(KERNELS[1:])
    assert queries.over_kernels(database, names, hosts=["gnr-01"], simulated=False) == {}
    assert list(queries.over_kernels(database, names, hosts=None, simulated=True)) == ["7.3.0"]


def test_kernels_that_ran_other_tests_do_not_push_those_out_that_ran_these(where: str) -> None:
    with History.open(where) as history:
        for number in range(9):
            here = SPR | {"kernel": f"6.{number}.0"}
            ran = result(test="test_a" if number < 4 else "test_b", provenance=here, started=T0 + number)
            history.add(RunRecord(), Results((ran,)))
        # An older kernel that ran again is among the latest.
        again = result(test="test_a", provenance=SPR | {"kernel": "6.0.0"}, started=T0 + 20)
        history.add(RunRecord(), Results((again,)))
        found = queries.over_kernels(
            history.database, ["lifecycle::test_a"], hosts=["spr-01"], simulated=False, kernels=2
        )
    assert list(found) == ["6.3.0", "6.0.0"]


def test_an_export_can_be_limited_to_what_is_asked_for(database: Database) -> None:
    assert len(list(queries.export(database, Wanted()))) == 16
    few = list(queries.export(database, Wanted(kernel="6.18.0", host="spr-01", test="test_c")))
    assert [one.started for one in few] == [T0 + 2 * DAY_S + 2, T0 + 2 * DAY_S + 3]


def test_an_empty_history_has_no_answers_and_no_trouble(where: str) -> None:
    database = Database.open(where)
    assert queries.runs(database) == []
    assert queries.environments(database, Wanted()) == []
    assert queries.failing(database, Wanted(), only_flaky=True) == []
    assert list(queries.export(database, Wanted())) == []
    assert queries.over_kernels(database, ["a::b"], hosts=["x"], simulated=False) == {}
    with pytest.raises(HistoryError, match="no kernel 'x'; there are: none"):
        queries.environments(database, Wanted(kernel="x"))
    database.close()


def test_lost_and_skipped_tests_are_no_failures(where: str) -> None:
    with History.open(where) as history:
        history.add(RunRecord(), every_kind())
        tests = {line.test for line in queries.failing(history.database, Wanted())}
    assert tests == {"lifecycle::test_finalize_twice_is_einval", "lifecycle::test_nasty[1]", "mmu::test_broken"}

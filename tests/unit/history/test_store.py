"""What is added comes back, once, whole or not at all, whoever else writes. tests/lab has it on PostgreSQL, too."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from tdxhw.history import migrations, queries
from tdxhw.history.database import Database
from tdxhw.history.errors import HistoryError
from tdxhw.history.queries import Wanted
from tdxhw.history.store import Added, History, RunRecord
from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status, merge
from tests.unit.history.worker import numbered
from tests.unit.report.samples import every_kind, result
from tests.unit.report.test_read import RESULTS

ROOT = Path(__file__).parents[3]


def add(where: str, *runs: Results) -> list[Added]:
    with History.open(where) as history:
        return [history.add(RunRecord(), run) for run in runs]


def kept(where: str) -> list[Result]:
    with History.open(where, create=False) as history:
        return list(queries.export(history.database, Wanted()))


def as_kept(one: Result) -> Result:
    """Return the result with what no database can hold, such as a NUL, as an escape."""
    return replace(
        one,
        suite=printable(one.suite),
        test=printable(one.test),
        host=printable(one.host),
        message=printable(one.message),
        details=printable(one.details),
        provenance={printable(key): printable(value) for key, value in one.provenance.items()},
    )


def worker(where: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "tests.unit.history.worker", where, *arguments], cwd=ROOT)


def test_everything_of_a_result_comes_back(where: str) -> None:
    add(where, every_kind())
    assert kept(where) == [as_kept(one) for one in every_kind().results]


def test_any_results_come_back_in_their_order_and_each_once(places: Callable[[], str]) -> None:
    where = places()

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(RESULTS.map(_of_its_own), min_size=1, max_size=6))
    def comes_back(results: list[Result]) -> None:
        before = kept(where)
        (added,) = add(where, Results(tuple(results)))
        after = kept(where)
        new = list(dict.fromkeys(map(_hashable, map(as_kept, results))))
        assert after[: len(before)] == before
        assert [_hashable(one) for one in after[len(before) :]] == [
            one for one in new if one not in {_hashable(old) for old in before}
        ]
        assert added.new == len(after) - len(before)

    add(where, Results((result(),)))
    comes_back()


def _of_its_own(one: Result) -> Result:
    """Return the result; a lost test says no longer when it began, so that no other result is its end."""
    return replace(one, started=0.0) if one.status is Status.MISS else one


def _hashable(one: Result) -> tuple[object, ...]:
    """Return what makes a result the same one; what it printed does not."""
    provenance = tuple(sorted(one.provenance.items()))
    return one.suite, one.test, one.host, one.status, one.duration_s, one.started, one.message, provenance


def test_the_same_run_is_added_once(where: str) -> None:
    first, again = add(where, every_kind(), every_kind())
    assert (first.new, first.known) == (8, 0)
    assert again == Added(first.run_id, 0, 8)
    assert len(kept(where)) == 8


def test_a_run_is_known_in_whatever_company_it_comes(where: str) -> None:
    one, other, third = numbered(0, 10), numbered(10, 20), numbered(20, 30)
    add(where, one, other)
    (added,) = add(where, merge([other, third, one]))
    assert (added.new, added.known) == (10, 20)
    assert sorted(r.started for r in kept(where)) == [1.7e9 + number for number in range(30)]


def test_several_known_runs_together_are_no_further_run(where: str) -> None:
    one, other = numbered(0, 3), numbered(10, 13)
    *_, added = add(where, one, other, merge([one, other]))
    assert (added.new, added.known) == (0, 6)
    with History.open(where) as history:
        assert [run.counts for run in queries.runs(history.database)] == [{"PASS": 3}, {"PASS": 3}]


def test_a_log_that_has_grown_continues_its_run(where: str) -> None:
    first, second = add(where, numbered(0, 10), numbered(0, 25))
    assert second == Added(first.run_id, 15, 10)


def test_two_runs_with_the_same_result_without_a_beginning_stay_two(where: str) -> None:
    broken = result(suite="own", test="(collection)", status=Status.ERROR, started=0.0, message="ImportError: x")
    runs = [Results((broken, *numbered(first, first + 3).results)) for first in (0, 10)]
    first, second, again = add(where, *runs, runs[1])
    assert first.run_id != second.run_id == again.run_id
    assert again == Added(second.run_id, 0, 4)


def test_a_run_of_which_nothing_says_when_it_began_is_known_again(where: str) -> None:
    undated = Results((result(started=0.0), result(test="test_other", started=0.0)))
    first, again = add(where, undated, undated)
    assert again == Added(first.run_id, 0, 2)


# A log that grows: its last test was running at first.
LOST = result(test="test_last", status=Status.MISS, duration_s=0.0, started=1.7e9 + 99, message="the run ended")
CAME_TO_ITS_END = replace(LOST, status=Status.PASS, duration_s=0.25, message="")


def grown(last: Result, *others: Result) -> Results:
    return Results((*numbered(0, 3).results, last, *others))


def test_a_test_that_a_growing_log_had_lost_is_no_longer_lost(where: str) -> None:
    first, second = add(where, grown(LOST), grown(CAME_TO_ITS_END))
    assert second == Added(first.run_id, 1, 3)
    assert [one.status for one in kept(where)] == [Status.PASS] * 4


def test_a_run_of_which_only_a_lost_test_was_known_goes_on(where: str) -> None:
    first, second = add(where, Results((LOST,)), grown(CAME_TO_ITS_END))
    assert second == Added(first.run_id, 4, 0)
    with History.open(where) as history:
        (run,) = queries.runs(history.database)
    assert run.counts == {"PASS": 4}


def test_an_older_copy_of_a_log_loses_no_test_again(where: str) -> None:
    first, second, third = add(where, grown(CAME_TO_ITS_END), grown(LOST), Results((LOST,)))
    assert second == Added(first.run_id, 0, 4)
    assert third == Added(first.run_id, 0, 1)
    assert Status.MISS not in {one.status for one in kept(where)}


def test_both_copies_of_a_log_at_once_lose_no_test(where: str) -> None:
    add(where, grown(LOST, CAME_TO_ITS_END))
    assert Status.MISS not in {one.status for one in kept(where)}


@pytest.mark.parametrize("other", [{"started": 1.7e9 + 100}, {"host": "gnr-01"}, {"test": "test_other"}])
def test_a_lost_test_stays_lost_whatever_became_of_another(where: str, other: dict[str, Any]) -> None:
    add(where, grown(LOST), grown(replace(CAME_TO_ITS_END, **other)))
    assert [one.test for one in kept(where) if one.status is Status.MISS] == ["test_last"]


def test_a_verdict_comes_to_the_run_that_is_known_already(where: str) -> None:
    with History.open(where) as history:
        history.add(RunRecord(), numbered(0, 3))
        history.add(RunRecord("validate", verdict="GOOD", line="GOOD: 3 tests pass as before"), numbered(0, 3))
        history.add(RunRecord(), numbered(0, 3))
        (run,) = queries.runs(history.database)
    assert (run.tool, run.verdict, run.line) == ("validate", "GOOD", "GOOD: 3 tests pass as before")


def test_a_run_begins_with_its_first_result(where: str) -> None:
    with History.open(where) as history:
        history.add(RunRecord(), Results((result(started=9.0), result(started=5.0), result(started=0.0))))
        (run,) = queries.runs(history.database)
    assert run.started == 5.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_refuses_what_is_no_time_and_keeps_nothing_of_the_run(where: str, number: float) -> None:
    with pytest.raises(HistoryError, match=r"lifecycle::test_td_is_created: (nan|inf) is no time"):
        add(where, Results((result(test="test_ok"), result(duration_s=number))))
    assert kept(where) == []


def test_refuses_a_run_without_results(where: str) -> None:
    with pytest.raises(HistoryError, match=r"a\.jsonl: no result to add"):
        add(where, Results((), ("a.jsonl",)))


# ---- whole or not at all, and one after the other ----


def test_a_tdxhw_that_is_killed_while_it_adds_leaves_nothing_of_it(where: str) -> None:
    add(where, numbered(20_000, 20_003))
    child = worker(where, "die")
    assert child.wait(timeout=60) == -signal.SIGKILL

    assert len(kept(where)) == 3
    (added,) = add(where, numbered(0, 12_000))
    assert added.new == 12_000


def test_processes_that_add_at_the_same_time_lose_nothing_and_add_nothing_twice(where: str) -> None:
    children = [worker(where, "add", str(number)) for number in range(3)]
    assert [child.wait(timeout=100) for child in children] == [0, 0, 0]

    results = kept(where)
    assert len(results) == 8 * 100 + 3 * 8 * 10
    assert len({one.started for one in results}) == len(results)
    with History.open(where) as history:
        assert len(queries.runs(history.database, limit=1000)) == 8 + 3 * 8


# ---- versions of the schema ----


def _add_a_column(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE run ADD COLUMN weather VARCHAR DEFAULT 'fine'"))


def _fail_half_way(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE run ADD COLUMN half VARCHAR"))
    connection.execute(text("ALTER TABLE no_such_table ADD COLUMN x VARCHAR"))


def columns(database: Database) -> set[str]:
    with database.reading() as connection:
        return set(connection.execute(text("SELECT * FROM run")).keys())


def test_an_older_schema_is_brought_up_to_date_with_its_results(where: str) -> None:
    add(where, every_kind())
    newer = Database.open(where, steps=(*migrations.MIGRATIONS, _add_a_column))
    with newer.reading() as connection:
        assert connection.execute(text("SELECT weather FROM run")).scalars().all() == ["fine"]
        versions = connection.execute(text("SELECT version FROM tdxhw_schema ORDER BY version")).scalars().all()
    assert versions == [1, 2]
    assert len(list(queries.export(newer, Wanted()))) == 8
    newer.close()
    again = Database.open(where, steps=(*migrations.MIGRATIONS, _add_a_column))
    assert "weather" in columns(again)
    again.close()


def test_a_migration_that_fails_leaves_what_was_there(where: str) -> None:
    add(where, every_kind())
    with pytest.raises(HistoryError, match="no_such_table"):
        Database.open(where, steps=(*migrations.MIGRATIONS, _fail_half_way))
    assert len(kept(where)) == 8
    old = Database.open(where)
    assert "half" not in columns(old)
    old.close()


def test_a_newer_schema_is_refused_by_an_older_tdxhw(where: str) -> None:
    Database.open(where, steps=(*migrations.MIGRATIONS, _add_a_column)).close()
    expected = r"made by a newer tdxhw \(schema 2, this one knows 1\): upgrade tdxhw"
    with pytest.raises(HistoryError, match=expected):
        Database.open(where)


def test_a_database_of_something_else_is_refused_and_left_alone(where: str) -> None:
    database = Database.open(where)
    with database.writing() as connection:
        for table in ("result", "run", "test", "environment", "tdxhw_schema"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("CREATE TABLE customers (name VARCHAR)"))
    database.close()
    with pytest.raises(HistoryError, match=r"a database of something else \(it has a table 'customers'\)"):
        History.open(where)


def test_the_order_in_which_runs_are_added_changes_no_answer(places: Callable[[], str]) -> None:
    runs = [Results((one,)) for one in every_kind().results] + [numbered(0, 20)]
    answers = []
    for seed in (1, 2):
        random.Random(seed).shuffle(runs)
        where = places()
        add(where, *runs)
        with History.open(where) as history:
            answers.append(
                (
                    queries.environments(history.database, Wanted()),
                    {one.test: one for one in queries.failing(history.database, Wanted())},
                )
            )
    assert answers[0] == answers[1]
    assert sum(place.counts.get(Status.PASS.value, 0) for place in answers[0][0]) == 22

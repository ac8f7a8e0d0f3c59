"""Retries: what is worth a second try, when the trying ends, and how the tests are named to `tdxhw run`."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.report.compare import Change, compare
from tdxhw.report.errors import ReportError
from tdxhw.report.results import Results, Status
from tdxhw.validate.retry import TRIES, lost, selection, suspects
from tests.unit.report.samples import SIM, result
from tests.unit.validate.test_verdict import RUNS, run

PASS, FAIL, MISS, SKIP = Status.PASS, Status.FAIL, Status.MISS, Status.SKIP
NAME = "lifecycle::test_td_is_created"
CASES: dict[str, tuple[Sequence[Status], Sequence[Status], bool]] = {
    "fails_for_the_first_time": ((PASS,), (FAIL,), True),
    "broke": ((PASS,), (Status.ERROR,), True),
    "failed_all_but_the_last_try": ((PASS,), (FAIL,) * (TRIES - 1), True),
    "failed_every_try": ((PASS,), (FAIL,) * TRIES, False),
    "passed_the_second_try": ((PASS,), (FAIL, PASS), False),
    "fails_as_before": ((FAIL,), (FAIL,), False),
    "failed_sometimes_before": ((PASS, FAIL), (FAIL,), False),
    "is_new_and_fails": ((), (FAIL,), True),
    "passes": ((PASS,), (PASS,), False),
    "is_skipped": ((PASS,), (SKIP,), False),
    "was_lost_with_the_host": ((PASS,), (MISS,), False),
    "failed_and_then_was_lost": ((PASS,), (FAIL, MISS), True),
    "failed_and_was_lost_until_the_tries_were_used_up": ((PASS,), (FAIL,) + (MISS,) * (TRIES - 1), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_test_that(case: str) -> None:
    before, now, again = CASES[case]
    steady = run(PASS, test="test_steady").results
    sides = (Results((*steady, *run(*statuses).results)) for statuses in (before, now))
    assert suspects(*sides) == ((NAME,) if again else ())


def test_what_was_lost_gets_a_second_chance_and_what_is_skipped_does_not() -> None:
    base = Results((result(), result(test="test_b"), result(test="test_c", status=FAIL)))
    new = Results((result(status=MISS), result(test="test_b", status=SKIP), result(test="test_c", status=MISS)))
    assert lost(base, new) == (NAME,)
    assert suspects(base, new) == ()


def test_a_retry_makes_nothing_comparable() -> None:
    assert suspects(Results(()), run(FAIL)) == ()
    assert suspects(run(PASS, provenance=SIM), run(FAIL)) == ()


@given(RUNS, RUNS, st.sampled_from([PASS, FAIL, MISS]))
def test_retries_end(base: Results, new: Results, outcome: Status) -> None:
    for _ in range(TRIES):
        again = suspects(base, new)
        if not again:
            return
        new = Results((*new.results, *(replace(one, status=outcome) for one in new.results if one.name in again)))
    assert suspects(base, new) == ()


@given(RUNS, RUNS)
def test_a_regression_that_is_no_suspect_had_all_its_tries(base: Results, new: Results) -> None:
    try:
        regressions = compare(base, new).of(Change.REGRESSION)
    except ReportError:
        return
    again = suspects(base, new)
    assert all(entry.name in again or len(entry.new) >= TRIES for entry in regressions)


def test_tests_are_named_as_the_command_line_wants_them() -> None:
    names = ("td_memory::test_a[4-x]", "td_memory::test_b", "kvm_device::test_a[5]", "own::TestClass::test_c")
    assert selection(names) == (("td_memory", "kvm_device", "own"), "test_a or test_b or test_c")

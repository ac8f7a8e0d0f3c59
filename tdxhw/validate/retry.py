"""Which tests to run again before anything is called a regression: it counts only when it failed every try."""

from collections.abc import Iterable
from typing import Final

from tdxhw.report.compare import Change, compare
from tdxhw.report.errors import ReportError
from tdxhw.report.results import Results, Status

TRIES: Final = 3
"""How often a test has to fail, the first time included."""


def suspects(base: Results, new: Results, *, tries: int = TRIES) -> tuple[str, ...]:
    """Return the tests (``suite::test``) that fail now, did not before, and had fewer than `tries` tries.

    Empty as soon as more tries would change nothing: each passed once (then it is flaky) or failed them all. Run
    again, their results are added to `new` (`tdxhw.report.results.merge`). A try lost to infrastructure is one, too,
    so that a host that is lost every time ends the retries.
    """
    return _named(base, new, (Change.REGRESSION, Change.NEW_FAILURE), tries)


def lost(base: Results, new: Results, *, tries: int = TRIES) -> tuple[str, ...]:
    """Return the tests that passed in `base` and were lost to infrastructure in `new`, for a second chance."""
    passed = {result.name for result in base.results if result.status is Status.PASS}
    return tuple(name for name in _named(base, new, (Change.LOST,), tries) if name in passed)


def _named(base: Results, new: Results, changes: Iterable[Change], tries: int) -> tuple[str, ...]:
    try:
        comparison = compare(base, new)
    except ReportError:  # one side is empty, or they are of different backends: no retry makes them comparable
        return ()
    wanted = [
        entry.name
        for change in changes
        for entry in comparison.of(change)
        if len(entry.new) < tries and any(_is_worth_a_try(result.status) for result in entry.new)
    ]
    return tuple(sorted(set(wanted)))


def _is_worth_a_try(status: Status) -> bool:
    """Say whether another try can come out differently: what a host does not offer, it will not offer then."""
    return status.is_bad or status is Status.MISS


def selection(names: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Return the suites and the ``-k`` expression for `tdxhw run` that run these tests.

    The expression names functions: the other parameters of a test run again with it, and so does a test whose name
    begins the same. That costs time and changes no verdict.
    """
    pairs = [name.partition("::") for name in names]
    suites = dict.fromkeys(suite for suite, _, _ in pairs)
    functions = dict.fromkeys(test.partition("[")[0].rpartition("::")[2] for _, _, test in pairs)
    return tuple(suites), " or ".join(functions)

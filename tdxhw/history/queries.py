"""Questions to the history: by run, test, kernel, host and module, what is flaky, and how a test did over kernels.

Names may be patterns (``6.18*``). What runs over many results is answered from an index alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, exists, func, select

from tdxhw.history.database import Database
from tdxhw.history.errors import HistoryError
from tdxhw.history.schema import FAILED, environment, result, run, test
from tdxhw.report.kernel_order import kernel_order
from tdxhw.report.results import SEVERITY, Result, Status
from tdxhw.report.trends import KernelPoint

_BAD: Final = [status.value for status in Status if status.is_bad]
_PASS: Final = Status.PASS.value
_COLUMNS: Final = {"kernel": environment.c.kernel, "host": environment.c.host, "module": environment.c.tdx_module}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which results a question is about. Empty: all."""

    kernel: str = ""
    host: str = ""
    module: str = ""
    test: str = ""  # suite::test
    since: float = 0.0  # [s since 1970], of runs
    simulated: bool | None = None  # None: either


@dataclass(frozen=True, slots=True)
class RunLine:
    """One run in numbers."""

    id: int
    started: float  # [s since 1970]
    tool: str
    verdict: str
    line: str
    sources: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict)  # by status, worst first
    kernels: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TestLine:
    """One result of a test."""

    __test__ = False  # not a test class

    run: int
    started: float  # [s since 1970], of the run where the result's own is unknown
    test: str
    host: str
    kernel: str
    module: str
    variant: str
    simulated: bool
    status: str
    duration_s: float
    message: str


@dataclass(frozen=True, slots=True)
class EnvironmentLine:
    """Everything that ran with one kernel and one module on one host, in numbers."""

    kernel: str
    module: str
    host: str
    simulated: bool
    counts: Mapping[str, int]  # by status, worst first
    duration_s: float  # [s] in tests


@dataclass(frozen=True, slots=True)
class FailingLine:
    """A test that failed, and how often it did not."""

    test: str
    kernel: str
    module: str
    host: str
    variant: str
    simulated: bool
    passed: int
    failed: int
    message: str  # of its latest failure


# ---- what is asked for ----


def _named(connection: Connection, column: ColumnElement[str], kind: str, pattern: str) -> list[str]:
    """Return the names that the pattern means. ``HistoryError`` with a guess if there is none."""
    names = [name for (name,) in connection.execute(select(column).distinct())]
    found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        guess = get_close_matches(pattern, names, 1)
        latest = sorted((name for name in names if name), key=kernel_order if kind == "kernel" else str)[-5:]
        hint = f"did you mean {guess[0]!r}?" if guess else f"there are: {', '.join(latest) or 'none'}"
        raise HistoryError(f"the history has no {kind} {pattern!r}; {hint}")
    return found


def _conditions(connection: Connection, wanted: Wanted) -> list[ColumnElement[bool]]:
    """Return what limits a query over `result`, by small sets of ids so that the indexes serve it."""
    conditions: list[ColumnElement[bool]] = []
    of_environment = [
        column.in_(_named(connection, column, kind, pattern))
        for kind, column in _COLUMNS.items()
        if (pattern := getattr(wanted, kind))
    ]
    if wanted.simulated is not None:
        of_environment.append(environment.c.simulated.is_(wanted.simulated))
    if of_environment:
        ids = connection.execute(select(environment.c.id).where(*of_environment)).scalars().all()
        conditions.append(result.c.environment_id.in_(ids))
    if wanted.test:
        conditions.append(result.c.test_id.in_(_test_ids(connection, wanted.test)))
    if wanted.since:
        of_result = run.alias()  # by itself: a query that shows runs as well has `run` for that
        conditions.append(exists().where(of_result.c.id == result.c.run_id, of_result.c.started >= wanted.since))
    return conditions


def _test_ids(connection: Connection, pattern: str) -> list[int]:
    """Return the tests that are meant: a full name, a pattern, or a test without its suite or parameters."""
    names = {f"{row.suite}::{row.test}": row.id for row in connection.execute(select(test))}
    tries = (
        lambda name: name == pattern,
        lambda name: name.partition("::")[2] == pattern,
        lambda name: fnmatchcase(name, pattern) or fnmatchcase(name.partition("::")[2], pattern),
        lambda name: pattern in (name.partition("[")[0], name.partition("::")[2].partition("[")[0]),
    )
    for is_meant in tries:
        if found := [number for name, number in names.items() if is_meant(name)]:
            return found
    guess = get_close_matches(pattern, [*names, *(name.partition("::")[2] for name in names)], 1)
    raise HistoryError(f"the history has no test {pattern!r}" + (f"; did you mean {guess[0]!r}?" if guess else ""))


def _counts(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    given: dict[str, int] = {}
    for status, count in pairs:
        given[status] = given.get(status, 0) + count
    return {status.value: given[status.value] for status in SEVERITY if given.get(status.value)}


# ---- answers ----


def runs(database: Database, wanted: Wanted = Wanted(), *, limit: int = 20) -> list[RunLine]:
    """Return the latest runs with a result that is wanted, the newest first; each in all its numbers."""
    with database.reading() as connection:
        conditions: list[ColumnElement[bool]] = [run.c.started >= wanted.since]
        of_results = _conditions(connection, replace(wanted, since=0.0))
        if of_results:
            conditions.append(run.c.id.in_(select(result.c.run_id).where(*of_results)))
        latest = select(run).where(*conditions).order_by(run.c.started.desc(), run.c.id.desc()).limit(limit)
        rows = connection.execute(latest).all()
        grouped = connection.execute(
            select(result.c.run_id, result.c.status, result.c.environment_id, func.count())
            .where(result.c.run_id.in_(select(latest.subquery().c.id)))
            .group_by(result.c.run_id, result.c.status, result.c.environment_id)
        ).all()
        used = {number for _, _, number, _ in grouped}
        places = {row.id: row for row in connection.execute(select(environment)) if row.id in used}
    of_runs: dict[int, list[tuple[str, Any, int]]] = {}
    for run_id, status, number, count in grouped:
        of_runs.setdefault(run_id, []).append((status, places[number], count))
    lines = []
    for row in rows:
        mine = of_runs.get(row.id, [])
        kernels, hosts, modules = (
            tuple(sorted({getattr(place, name) for _, place, _ in mine} - {""}))
            for name in ("kernel", "host", "tdx_module")
        )
        counts = _counts((status, count) for status, _, count in mine)
        sources = tuple(json.loads(row.sources))
        lines.append(
            RunLine(row.id, row.started, row.tool, row.verdict, row.line, sources, counts, kernels, hosts, modules)
        )
    return lines


def of_test(database: Database, wanted: Wanted, *, limit: int = 50) -> list[TestLine]:
    """Return the results of a test, the newest first."""
    with database.reading() as connection:
        query = (
            _joined()
            .where(*_conditions(connection, wanted))
            .order_by(result.c.started.desc(), result.c.id.desc())
            .limit(limit)
        )
        return [
            TestLine(
                row.run_id, row.started or row.run_started, f"{row.suite}::{row.test}", row.host, row.kernel,
                row.tdx_module, row.variant, row.simulated, row.status, row.duration_s, row.message,
            )
            for row in connection.execute(query)
        ]  # fmt: skip


def _joined() -> Select[Any]:
    return (
        select(
            result.c.run_id, result.c.status, result.c.duration_s, result.c.started, result.c.message, result.c.details,
            run.c.started.label("run_started"), test.c.suite, test.c.test, environment.c.host, environment.c.kernel,
            environment.c.tdx_module, environment.c.variant, environment.c.simulated, environment.c.provenance,
        )
        .join(run, result.c.run_id == run.c.id)
        .join(test, result.c.test_id == test.c.id)
        .join(environment, result.c.environment_id == environment.c.id)
    )  # fmt: skip


def environments(database: Database, wanted: Wanted) -> list[EnvironmentLine]:
    """Return the results in numbers, by kernel, module and host."""
    with database.reading() as connection:
        query = (
            select(result.c.environment_id, result.c.status, func.count(), func.sum(result.c.duration_s))
            .where(*_conditions(connection, wanted))
            .group_by(result.c.environment_id, result.c.status)
        )
        grouped = connection.execute(query).all()
        places = {row.id: row for row in connection.execute(select(environment))}
    merged: dict[tuple[str, str, str, bool], list[tuple[str, int, float]]] = {}
    for number, status, count, seconds in grouped:
        place = places[number]
        key = (place.kernel, place.tdx_module, place.host, place.simulated)
        merged.setdefault(key, []).append((status, count, seconds))
    return [
        EnvironmentLine(*key, _counts((status, count) for status, count, _ in found), sum(s for _, _, s in found))
        for key, found in sorted(merged.items(), key=lambda one: (kernel_order(one[0][0]), one[0]))
    ]


def failing(database: Database, wanted: Wanted, *, only_flaky: bool = False, limit: int = 50) -> list[FailingLine]:
    """Return the tests that failed, by kernel, module and host, those that failed most often first.

    With `only_flaky`, those that passed as well: under the same conditions in every respect that is recorded.
    """
    failed = func.count().label("failed")
    with database.reading() as connection:
        conditions = _conditions(connection, wanted)
        bad = (
            select(result.c.environment_id, result.c.test_id, failed)
            .where(FAILED, *conditions)
            .group_by(result.c.environment_id, result.c.test_id)
            .subquery()
        )
        passed = (
            select(func.count())
            .select_from(result)
            .where(
                result.c.environment_id == bad.c.environment_id, result.c.test_id == bad.c.test_id,
                result.c.status == _PASS, *conditions,
            )
            .correlate(bad)
            .scalar_subquery()
        )  # fmt: skip
        counted = select(bad.c.environment_id, bad.c.test_id, passed.label("passed"), bad.c.failed).subquery()
        query = (
            select(counted)
            .where(*([counted.c.passed > 0] if only_flaky else []))
            .order_by(counted.c.failed.desc(), counted.c.test_id, counted.c.environment_id)
            .limit(limit)
        )
        lines = []
        for number, test_id, good, bad in connection.execute(query).all():
            latest = (
                _joined()
                .where(FAILED, result.c.environment_id == number, result.c.test_id == test_id)
                .order_by(result.c.started.desc(), result.c.id.desc())
                .limit(1)
            )  # fmt: skip
            row = connection.execute(latest).one()
            lines.append(
                FailingLine(
                    f"{row.suite}::{row.test}", row.kernel, row.tdx_module, row.host, row.variant, row.simulated,
                    int(good), int(bad), row.message,
                )
            )  # fmt: skip
        return lines


def export(database: Database, wanted: Wanted) -> Iterator[Result]:
    """Yield the results as they were added, in that order."""
    with database.reading() as connection:
        query = _joined().where(*_conditions(connection, wanted)).order_by(result.c.id)
        for row in connection.execution_options(yield_per=1000).execute(query):
            yield Result(
                row.suite, row.test, row.host, Status(row.status), row.duration_s, row.started, row.message,
                row.details, json.loads(row.provenance),
            )  # fmt: skip


def over_kernels(
    database: Database, tests: Sequence[str], *, hosts: Sequence[str] | None, simulated: bool, kernels: int = 20
) -> dict[str, dict[str, KernelPoint]]:
    """Return ``{kernel: {suite::test: point}}`` of these tests on these hosts, for the kernels that ran last.

    `hosts` None is any; `kernels` is how many at most. The order of the kernels is that of their latest run.
    """
    wanted = set(tests)
    found: dict[str, dict[str, KernelPoint]] = {}
    with database.reading() as connection:
        names = {
            row.id: name for row in connection.execute(select(test)) if (name := f"{row.suite}::{row.test}") in wanted
        }
        here = select(environment).where(environment.c.simulated.is_(simulated), environment.c.kernel != "")
        if hosts is not None:
            here = here.where(environment.c.host.in_(hosts))
        of_kernel: dict[str, list[int]] = {}
        for row in connection.execute(here.order_by(environment.c.last_run.desc(), environment.c.id)):
            of_kernel.setdefault(row.kernel, []).append(row.id)
        candidates = list(of_kernel)
        while candidates and len(found) < kernels:  # some may have run other tests only
            some, candidates = candidates[:kernels], candidates[kernels:]
            points = _points(connection, [number for kernel in some for number in of_kernel[kernel]], names)
            found.update((kernel, points[kernel]) for kernel in some if points.get(kernel))
    return dict(reversed(list(found.items())[:kernels]))


def _points(
    connection: Connection, places: Sequence[int], names: Mapping[int, str]
) -> dict[str, dict[str, KernelPoint]]:
    query = (
        select(environment.c.kernel, result.c.test_id, result.c.status, func.count(), func.sum(result.c.duration_s))
        .join(environment, result.c.environment_id == environment.c.id)
        .where(result.c.environment_id.in_(places), result.c.test_id.in_(list(names)))
        .group_by(environment.c.kernel, result.c.test_id, result.c.status)
    )
    sums: dict[str, dict[str, list[float]]] = {}
    for kernel, test_id, status, count, seconds in connection.execute(query):
        one = sums.setdefault(kernel, {}).setdefault(names[test_id], [0, 0, 0.0])
        if status == _PASS:
            one[0] += count
            one[2] += seconds
        elif status in _BAD:
            one[1] += count
    return {
        kernel: {
            name: KernelPoint(int(good), int(bad), seconds / good if good else None)
            for name, (good, bad, seconds) in of_tests.items()
            if good or bad
        }
        for kernel, of_tests in sums.items()
    }

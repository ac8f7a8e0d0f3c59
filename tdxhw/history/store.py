"""Keep the results of runs. The same result is kept once, however often and in whatever company it is added."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, delete, insert, select, update

from tdxhw.history.database import Database
from tdxhw.history.errors import HistoryError
from tdxhw.history.schema import environment, result, run, test
from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status

_CHUNK: Final = 500
_PAIRS: Final = 25
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What is known of a run besides its results."""

    tool: str = "run"  # "run", "validate"
    started: float = 0.0  # [s since 1970]; 0: when its first result began
    verdict: str = ""  # of a validation: "GOOD", "REGRESSED", "INCONCLUSIVE"
    line: str = ""  # the verdict in one line


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a run that was added."""

    run_id: int
    new: int  # results that were not there before
    known: int  # results that were


class History:
    """The results of all runs; a context manager."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, where: str | Path, *, create: bool = True) -> "History":
        """Open the history in a file or at a ``postgresql://`` URL. ``HistoryError`` if that cannot be done."""
        return cls(Database.open(where, create=create))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the database."""
        self.database.close()

    def add(self, record: RunRecord, results: Results) -> Added:
        """Add a run, whole or not at all. What is there already is not added again.

        A log that has grown since it was added continues its run; a test that it lost then and has the end of now is
        no longer lost. ``HistoryError`` if there is nothing to add.
        """
        if not results.results:
            raise HistoryError(f"{', '.join(results.sources) or 'the run'}: no result to add")
        keyed = {_key(one): one for one in _ended(map(_storable, results.results))}
        with self.database.writing() as connection:
            known = _known_runs(connection, keyed)
            new = {key: one for key, one in keyed.items() if key not in known}
            tests = _test_ids(connection, new.values())
            replaced, late = _lost_once(connection, new, tests)
            known |= late
            new = {key: one for key, one in new.items() if key not in late}
            # A result without a beginning may be that of any run: a suite that breaks does so again, word for word.
            dated = {number for key, number in known.items() if keyed[key].started}
            of_runs = {*dated, *replaced.values()}
            if not any(one.started for one in keyed.values()):
                of_runs = set(known.values())
            if not new and of_runs and not record.verdict:
                return Added(max(of_runs), 0, len(known))  # of several runs that are all here; no run of its own
            run_id = _add_run(connection, record, results, keyed.values(), of_runs)
            for ids in _chunks(replaced):
                connection.execute(delete(result).where(result.c.id.in_(ids)))
            environments = _environment_ids(connection, new.values())
            rows = (
                {
                    "key": key,
                    "run_id": run_id,
                    "test_id": tests[one.suite, one.test],
                    "environment_id": environments[_environment_digest(one)],
                    "status": one.status.value,
                    "duration_s": float(one.duration_s),
                    "started": float(one.started),
                    "message": one.message,
                    "details": one.details,
                }
                for key, one in new.items()
            )
            while chunk := list(islice(rows, 10 * _CHUNK)):
                connection.execute(insert(result), chunk)
            for ids in _chunks(set(environments.values())):
                older = update(environment).where(environment.c.id.in_(ids), environment.c.last_run < run_id)
                connection.execute(older.values(last_run=run_id))
        return Added(run_id, len(new), len(known))


def _add_run(
    connection: Connection, record: RunRecord, results: Results, kept: Iterable[Result], of_runs: set[int]
) -> int:
    """Return the run that the results belong to: the one that has some of them already, or a new one."""
    if len(of_runs) == 1:
        (run_id,) = of_runs
        if record.verdict:
            said = {"tool": record.tool, "verdict": record.verdict, "line": printable(record.line)}
            connection.execute(update(run).where(run.c.id == run_id).values(**said))
        return run_id
    began = [one.started for one in kept if one.started]
    row = {
        "started": record.started or (min(began) if began else time.time()),
        "recorded": time.time(),
        "tool": record.tool,
        "verdict": record.verdict,
        "line": printable(record.line),
        "sources": json.dumps(results.sources),
    }
    return int(connection.execute(insert(run).values(**row).returning(run.c.id)).scalar_one())


# ---- what makes two the same ----


def _storable(one: Result) -> Result:
    """Return the result as a database can hold it: a NUL, for one, no PostgreSQL text can."""
    for number in (one.duration_s, one.started):
        if not math.isfinite(number):
            raise HistoryError(f"{one.name}: {number} is no time")
    return Result(
        printable(one.suite),
        printable(one.test),
        printable(one.host),
        one.status,
        float(one.duration_s),
        float(one.started),
        printable(one.message),
        printable(one.details),
        {printable(key): printable(value) for key, value in one.provenance.items()},
    )


def _digest(*parts: object) -> bytes:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def _key(one: Result) -> bytes:
    """Return what tells results apart. The same test, there, then, for so long, with that outcome, is the same one."""
    where = (one.host, dict(one.provenance))
    return _digest(one.suite, one.test, where, one.status.value, one.started, one.duration_s, one.message)


def _environment_digest(one: Result) -> bytes:
    return _digest(one.host, dict(one.provenance))


# ---- rows that results share ----


def _chunks(keys: Iterable[Any], size: int = _CHUNK) -> Iterator[Sequence[Any]]:
    keys = iter(keys)
    while chunk := list(islice(keys, size)):
        yield chunk


def _known_runs(connection: Connection, keys: Iterable[bytes]) -> dict[bytes, int]:
    """Return the run of each result that is there already."""
    found: dict[bytes, int] = {}
    for chunk in _chunks(keys):
        query = select(result.c.key, result.c.run_id).where(result.c.key.in_(chunk))
        found.update((bytes(key), run_id) for key, run_id in connection.execute(query))
    return found


def _lost_once(
    connection: Connection, new: Mapping[bytes, Result], tests: Mapping[tuple[str, str], int]
) -> tuple[dict[int, int], dict[bytes, int]]:
    """Find tests that are a ``MISS`` on one side and came to their end on the other: of a log that was still growing.

    Return the rows of such a ``MISS`` in the history with their runs, and the keys of those that come too late, with
    the runs of the results that are there instead.
    """
    lost: dict[tuple[int, float, str], list[bytes]] = {}
    ended: set[tuple[int, float, str]] = set()
    for key, one in new.items():
        if one.started:
            begun = (tests[one.suite, one.test], one.started, one.host)
            if one.status is Status.MISS:
                lost.setdefault(begun, []).append(key)
            else:
                ended.add(begun)
    replaced: dict[int, int] = {}
    late: dict[bytes, int] = {}
    for chunk in _chunks({(test_id, started) for test_id, started, _ in (*lost, *ended)}, _PAIRS):
        test_ids, beginnings = zip(*chunk, strict=True)
        query = (
            select(
                result.c.id, result.c.run_id, result.c.test_id, result.c.started, result.c.status, environment.c.host
            )
            .join(environment, result.c.environment_id == environment.c.id)
            # SQLite has no index for pairs; in small chunks the others that this finds, too, cost less than one each.
            .where(result.c.test_id.in_(test_ids), result.c.started.in_(beginnings))
        )
        for row in connection.execute(query):
            begun = (row.test_id, row.started, row.host)
            if row.status != Status.MISS.value:
                late.update((key, row.run_id) for key in lost.get(begun, ()))
            elif begun in ended:
                replaced[row.id] = row.run_id
    return replaced, late


def _ended(results: Iterable[Result]) -> Iterator[Result]:
    """Yield the results, but not a ``MISS`` of a test whose end is among them, too."""
    results = list(results)

    def begun(one: Result) -> tuple[str, str, str, float]:
        return one.suite, one.test, one.host, one.started

    ends = {begun(one) for one in results if one.status is not Status.MISS and one.started}
    return (one for one in results if one.status is not Status.MISS or begun(one) not in ends)


def _test_ids(connection: Connection, results: Iterable[Result]) -> dict[tuple[str, str], int]:
    wanted = dict.fromkeys((one.suite, one.test) for one in results)
    suites = {suite for suite, _ in wanted}

    def present() -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for chunk in _chunks(suites):
            query = select(test.c.suite, test.c.test, test.c.id).where(test.c.suite.in_(chunk))
            found.update(((row.suite, row.test), row.id) for row in connection.execute(query))
        return found

    ids = present()
    missing = [{"suite": suite, "test": name} for suite, name in wanted if (suite, name) not in ids]
    if missing:
        connection.execute(insert(test), missing)
        ids = present()
    return ids


def _environment_ids(connection: Connection, results: Iterable[Result]) -> dict[bytes, int]:
    wanted = {_environment_digest(one): one for one in results}

    def present() -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for chunk in _chunks(wanted):
            query = select(environment.c.digest, environment.c.id).where(environment.c.digest.in_(chunk))
            found.update((bytes(digest), number) for digest, number in connection.execute(query))
        return found

    ids = present()
    missing = [
        {
            "digest": digest,
            "host": one.host,
            "simulated": one.is_simulated,
            "variant": one.variant,
            "kernel": one.provenance.get("kernel", ""),
            "tdx_module": one.provenance.get("tdx_module", ""),
            "provenance": json.dumps(dict(one.provenance), sort_keys=True),
            "last_run": 0,
        }
        for digest, one in wanted.items()
        if digest not in ids
    ]
    if missing:
        connection.execute(insert(environment), missing)
        ids = present()
    return ids

"""The history on a real PostgreSQL server: every test of tests/unit/history that is not about a file."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tdxhw.history.database import Database
from tests.lab.missing import skip_or_fail
from tests.lab.postgresql_server import server, why_impossible
from tests.unit.history.million import fastest, fill
from tests.unit.history.test_queries import *  # noqa: F403
from tests.unit.history.test_store import *  # noqa: F403


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    reason = why_impossible()
    if reason:
        skip_or_fail(reason)
    # Not below pytest's folder: the server's user may not go there, and a socket's path is short.
    with TemporaryDirectory(prefix="tdxhw-postgresql-") as folder, server(Path(folder)) as new_database:
        yield new_database


@pytest.fixture
def places(new_database: Callable[[], str]) -> Callable[[], str]:
    return new_database


@pytest.fixture
def where(new_database: Callable[[], str]) -> str:
    return new_database()


def test_a_million_results_are_asked_in_less_than_a_second(where: str) -> None:
    database = Database.open(where)
    fill(database, 1_000_000)
    times = fastest(database, time.monotonic)
    database.close()
    assert max(times.values()) < 1, times

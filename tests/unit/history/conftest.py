"""Where the tests keep their histories: in SQLite files. tests/lab runs the same tests on PostgreSQL."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest


@pytest.fixture
def places(tmp_path: Path) -> Callable[[], str]:
    """Return what returns a place for a new history at each call."""
    numbers = count()
    return lambda: str(tmp_path / f"history-{next(numbers)}.sqlite")


@pytest.fixture
def where(places: Callable[[], str]) -> str:
    """Return a place for a new history."""
    return places()

"""What the tests run in other processes: `python -m tests.unit.history.worker WHERE WHAT [NUMBER]`."""

import os
import signal
import sys
from typing import Any

from sqlalchemy import event

from tdxhw.history.store import History, RunRecord
from tdxhw.report.results import Result, Results
from tests.unit.report.samples import result


def numbered(first: int, count: int) -> Results:
    return Results(tuple(result(test=f"test_{number % 50}", started=1.7e9 + number) for number in range(first, count)))


def die_in_the_middle(history: History) -> None:
    """Be killed once a part of the results is in the database, before the rest is."""
    seen = 0

    @event.listens_for(history.database.engine, "after_cursor_execute")
    def _executed(_c: Any, _cursor: Any, statement: str, *_rest: object) -> None:
        nonlocal seen
        seen += statement.startswith("INSERT INTO result")
        if seen == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    history.add(RunRecord(), numbered(0, 12_000))


def main(where: str, what: str, number: int = 0) -> None:
    with History.open(where) as history:
        if what == "die":
            die_in_the_middle(history)
        for run in range(8):
            shared: tuple[Result, ...] = numbered(run * 100, run * 100 + 100).results
            own = numbered(10_000 * (number + 1) + run * 10, 10_000 * (number + 1) + run * 10 + 10).results
            history.add(RunRecord(), Results(shared))
            history.add(RunRecord(), Results(own))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

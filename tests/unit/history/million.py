"""A history of a million results, made by the database itself: adding them one by one would take minutes."""

import random
from collections.abc import Callable
from typing import Final

from sqlalchemy import insert, text

from tdxhw.history import queries
from tdxhw.history.database import Database
from tdxhw.history.queries import Wanted
from tdxhw.history.schema import environment, run, test

TESTS: Final = 500
KERNELS: Final = 100
HOSTS: Final = 8
MODULES: Final = 5

# Per run every test once: 97 of 100 pass, 1 fails, 2 are skipped, spread by a multiplicative hash.
_FILL: Final = """
INSERT INTO result (id, key, run_id, test_id, environment_id, status, duration_s, started, message, details)
SELECT r * {tests} + t, {key}, r, t, (r - 1) / {runs_per_environment} + 1,
       CASE WHEN (r * 7919 + t * 104729) % 100 = 0 THEN 'FAIL'
            WHEN (r * 7919 + t * 104729) % 100 < 3 THEN 'SKIP' ELSE 'PASS' END,
       (t % 13) * 0.1 + 0.01, 1.7e9 + r * 3600.0 + t,
       CASE WHEN (r * 7919 + t * 104729) % 100 = 0 THEN 'KVM_TDX_INIT_VM: EIO' ELSE '' END, ''
FROM {runs}, {all_tests}
"""
_SQLITE: Final = {
    "key": "randomblob(16)",
    "runs": "(WITH RECURSIVE n(r) AS (SELECT 1 UNION ALL SELECT r + 1 FROM n WHERE r < {count}) SELECT r FROM n)",
    "all_tests": "(WITH RECURSIVE m(t) AS (SELECT 1 UNION ALL SELECT t + 1 FROM m WHERE t < {tests}) SELECT t FROM m)",
}
_POSTGRESQL: Final = {
    "key": "decode(md5(r || ' ' || t), 'hex')",
    "runs": "generate_series(1, {count}) AS r",
    "all_tests": "generate_series(1, {tests}) AS t",
}


def fill(database: Database, results: int) -> None:
    """Fill an empty history with this many results."""
    runs = results // TESTS
    per_environment = runs // (KERNELS * HOSTS)
    dialect = _SQLITE if database.engine.dialect.name == "sqlite" else _POSTGRESQL
    numbers = {"tests": TESTS, "runs_per_environment": per_environment, "count": runs}
    randomness = random.Random(1)
    with database.writing() as connection:
        rows = [{"suite": f"suite_{number % 20}", "test": f"test_{number}[{number % 4}]"} for number in range(TESTS)]
        connection.execute(insert(test), rows)
        connection.execute(
            insert(environment),
            [
                {
                    "digest": randomness.randbytes(16), "host": f"host-{host}", "simulated": False,
                    "variant": "mainline", "kernel": f"6.{kernel // 10}.{kernel % 10}",
                    "tdx_module": f"1.5.{kernel % MODULES}", "provenance": "{}",
                    "last_run": (kernel * HOSTS + host + 1) * per_environment,
                }
                for kernel in range(KERNELS) for host in range(HOSTS)
            ]
            + [
                {
                    "digest": randomness.randbytes(16), "host": "the-last", "simulated": False, "variant": "mainline",
                    "kernel": "7.0.0", "tdx_module": "1.5.9", "provenance": "{}", "last_run": runs,
                }
                for _ in range(runs // per_environment + 1 - KERNELS * HOSTS)
            ],
        )  # fmt: skip
        connection.execute(
            insert(run),
            [
                {"started": 1.7e9 + number * 3600, "recorded": 0.0, "tool": "run", "verdict": "", "line": "",
                 "sources": "[]"}
                for number in range(1, runs + 1)
            ],
        )  # fmt: skip
        statement = _FILL.format(**{key: value.format(**numbers) for key, value in dialect.items()}, **numbers)
        connection.execute(text(statement))
    with database.writing() as connection:
        connection.execute(text("ANALYZE"))


def questions(database: Database) -> dict[str, Callable[[], object]]:
    """Return one question of each kind; every one has an answer."""
    names = [f"suite_{number % 20}::test_{number}[{number % 4}]" for number in range(TESTS)]
    late = 1.7e9 + 1000 * 3600
    hosts = [f"host-{number}" for number in range(HOSTS)]
    return {
        "runs": lambda: queries.runs(database),
        "runs of a kernel": lambda: queries.runs(database, Wanted(kernel="6.3.*")),
        "a test": lambda: queries.of_test(database, Wanted(test="test_77")),
        "a test under a kernel": lambda: queries.of_test(database, Wanted(test="test_77", kernel="6.9.1")),
        "a kernel": lambda: queries.environments(database, Wanted(kernel="6.9.1")),
        "a host": lambda: queries.environments(database, Wanted(host="host-3")),
        "a module": lambda: queries.environments(database, Wanted(module="1.5.3")),
        "failing under a kernel": lambda: queries.failing(database, Wanted(kernel="6.9.1")),
        "failing under any 6.x": lambda: queries.failing(database, Wanted(kernel="6*")),
        "failing on a host": lambda: queries.failing(database, Wanted(host="host-3")),
        "failing with a module": lambda: queries.failing(database, Wanted(module="1.5.3")),
        "flaky": lambda: queries.failing(database, Wanted(), only_flaky=True),
        "flaky lately": lambda: queries.failing(database, Wanted(since=late), only_flaky=True),
        "trends of a host": lambda: queries.over_kernels(database, names, hosts=hosts[:1], simulated=False),
        "trends of all hosts": lambda: queries.over_kernels(database, names, hosts=hosts, simulated=False),
    }


def fastest(database: Database, clock: Callable[[], float]) -> dict[str, float]:
    """Ask everything until it takes less than a second, three times at most; return the times [s]."""
    times: dict[str, float] = {}
    for name, question in questions(database).items():
        for _ in range(3):
            begun = clock()
            assert question(), name
            times[name] = min(clock() - begun, times.get(name, 1e9))
            if times[name] < 1:
                break
    return times

"""The tables of the history, the same on SQLite and PostgreSQL.

::

    run ──< result >── test
                 >──── environment

A result is one run of one test. What it shares with thousands of others, the test's name and everything about host
and kernel, is a row of its own. Every query has its index; the names of the tables are for people with `sqlite3`, too.
"""

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_TABLE: Final = "tdxhw_schema"
"""How a database says that it is ours, and which version its tables have."""

METADATA: Final = MetaData()

FAILED: Final = text("status IN ('FAIL', 'ERROR')")
"""Word for word the condition of an index: only then SQLite knows that it may use it."""

schema = Table(
    SCHEMA_TABLE,
    METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("migrated_at", Double, nullable=False),  # [s since 1970]
    Column("tdxhw", String, nullable=False),  # the version of tdxhw that did it
)

run = Table(
    "run",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("started", Double, nullable=False, index=True),  # [s since 1970]
    Column("recorded", Double, nullable=False),  # [s since 1970], when it came here
    Column("tool", String, nullable=False),  # "run", "validate"
    Column("verdict", String, nullable=False),  # of a validation: "GOOD"; else empty
    Column("line", Text, nullable=False),  # the verdict in one line
    Column("sources", Text, nullable=False),  # file names, a JSON list
)

test = Table(
    "test",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("suite", String, nullable=False),
    Column("test", String, nullable=False),
    UniqueConstraint("suite", "test"),
)

environment = Table(
    "environment",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("digest", LargeBinary(16), nullable=False, unique=True),  # of host and provenance
    Column("host", String, nullable=False, index=True),
    Column("simulated", Boolean, nullable=False),
    Column("variant", String, nullable=False),  # profile if simulated, else dialect
    Column("kernel", String, nullable=False, index=True),  # release
    Column("tdx_module", String, nullable=False, index=True),  # version
    Column("provenance", Text, nullable=False),  # everything that is known, a JSON object
    Column("last_run", Integer, nullable=False),  # the latest run with results from here
)

result = Table(
    "result",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("key", LargeBinary(16), nullable=False, unique=True),  # what makes a result the same one
    Column("run_id", ForeignKey("run.id"), nullable=False),
    Column("test_id", ForeignKey("test.id"), nullable=False),
    Column("environment_id", ForeignKey("environment.id"), nullable=False),
    Column("status", String(5), nullable=False),
    Column("duration_s", Double, nullable=False),  # [s]
    Column("started", Double, nullable=False),  # [s since 1970], 0 where unknown
    Column("message", Text, nullable=False),
    Column("details", Text, nullable=False),
    # A run in numbers; a test over time; everything by kernel, host or module, without touching the table.
    Index("result_by_run", "run_id", "status", "environment_id"),
    Index("result_by_test", "test_id", "started"),
    Index("result_by_environment", "environment_id", "test_id", "status", "run_id", "duration_s"),
    # Few fail, so what failed is found without counting what passed.
    Index("result_failed", "environment_id", "test_id", "run_id", sqlite_where=FAILED, postgresql_where=FAILED),
)

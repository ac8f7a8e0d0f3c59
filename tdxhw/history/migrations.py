"""The history's schema has a version. An older one is brought up to date in one transaction, a newer one refused.

A further version is one more function in `MIGRATIONS`; those that are there never change again. Both databases roll
back a change of tables like any other, so a migration that dies leaves the version that was there.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import Connection, func, insert, inspect, select

from tdxhw import __version__
from tdxhw.history.errors import HistoryError
from tdxhw.history.schema import METADATA, SCHEMA_TABLE, schema

Migration = Callable[[Connection], None]


def _first_tables(connection: Connection) -> None:
    METADATA.create_all(connection, checkfirst=False)


MIGRATIONS: Final[Sequence[Migration]] = (
    _first_tables,  # 1
)


def version_of(connection: Connection, name: str) -> int:
    """Return the version of the schema, 0 for an empty database. ``HistoryError`` if it is somebody else's."""
    tables = inspect(connection).get_table_names()
    if SCHEMA_TABLE not in tables:
        if tables:
            raise HistoryError(f"{name}: a database of something else (it has a table {tables[0]!r}); left as it is")
        return 0
    return connection.execute(select(func.max(schema.c.version))).scalar_one() or 0


def check(version: int, name: str, migrations: Sequence[Migration] = MIGRATIONS) -> bool:
    """Say whether the schema is up to date. ``HistoryError`` if a newer tdxhw made it."""
    if version > len(migrations):
        raise HistoryError(
            f"{name}: made by a newer tdxhw (schema {version}, this one knows {len(migrations)}): upgrade tdxhw"
        )
    return version == len(migrations)


def migrate(connection: Connection, name: str, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the schema up to date, in a transaction that locks out other writers."""
    version = version_of(connection, name)  # again: another tdxhw may have been faster
    check(version, name, migrations)
    for number, step in enumerate(migrations[version:], version + 1):
        step(connection)
        row = {"version": number, "migrated_at": time.time(), "tdxhw": __version__}
        connection.execute(insert(schema), [row])

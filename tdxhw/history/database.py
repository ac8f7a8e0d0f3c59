"""Open the database: an SQLite file that only its user can read, or PostgreSQL.

SQLite's driver begins transactions late and commits tables early unless told otherwise; here every transaction begins
where it says so, and one that is going to write waits for the other writer at its beginning, not in its middle.
"""

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tdxhw.history import migrations
from tdxhw.history.errors import HistoryError

BUSY_S: Final = 60
"""How long a writer waits for the other writers [s]; one that adds a run takes a fraction of a second."""

_CONNECT_S: Final = 10
_WRITERS_LOCK: Final = 0x7464_7868_7700  # "tdxhw": a lock of PostgreSQL that everybody who writes takes
_MAGIC: Final = b"SQLite format 3\0"
_WRITES: Final = "tdxhw_writes"
_HALF_A_URL: Final = re.compile(r"postgres(ql)?(\+\w+)?:")
_NO_URL: Final = "the history's URL cannot be read: postgresql://USER@HOST/DATABASE"
"""What was given is not shown: there may be a password in it."""


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return ``$XDG_STATE_HOME/tdxhw/history.sqlite``."""
    return Path(environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "tdxhw" / "history.sqlite"


class Database:
    """A database whose schema is up to date."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        """What errors call it: the file, or the URL without its password."""

    @classmethod
    def open(
        cls,
        where: str | Path,
        *,
        create: bool = True,
        busy_s: float = BUSY_S,
        steps: Sequence[migrations.Migration] = migrations.MIGRATIONS,
    ) -> "Database":
        """Open it, and create it if need be. ``HistoryError``: cannot be reached, is broken, newer, somebody else's."""
        url = _url(where)
        is_file = url.get_backend_name() == "sqlite"
        database = cls(_sqlite(url, busy_s, create=create) if is_file else _postgresql(url), _name(url))
        try:
            with database.reading() as connection:
                up_to_date = migrations.check(migrations.version_of(connection, database.name), database.name, steps)
            if not up_to_date:
                if is_file:
                    database.let_readers_read_on()
                with database.writing() as connection:
                    migrations.migrate(connection, database.name, steps)
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def let_readers_read_on(self) -> None:
        """Make SQLite keep a write-ahead log, so that readers and the writer do not wait for each other."""
        with self._told(), closing(self.engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA journal_mode = WAL")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the database, whatever others write meanwhile."""
        with self._told(), self.engine.connect() as connection:
            if self._is_postgresql:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection whose changes all come or none does; one writer at a time."""
        with self._told(), self.engine.connect() as connection:
            connection.execution_options(**{_WRITES: True})
            with connection.begin():
                if self._is_postgresql:  # READ COMMITTED: what the one before us wrote is seen once we have the lock
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _WRITERS_LOCK})
                yield connection

    @property
    def _is_postgresql(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise HistoryError(f"{self.name}: {_in_one_line(error)}") from error


def _in_one_line(error: SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None) or error
    said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    if "locked" in said:
        return f"another process is writing and does not end; try again ({said})"
    if "malformed" in said or "not a database" in said:
        return f"the file is broken ({said}); it is left as it is: put a copy of it back, or move it away"
    return said


def _url(where: str | Path) -> URL:
    told = str(where)
    if "://" not in told:
        if not told:
            raise HistoryError("the history has no name: give a file or a postgresql:// URL")
        if _HALF_A_URL.match(told):
            raise HistoryError(_NO_URL)
        return URL.create("sqlite", database=str(Path(told).expanduser()))
    try:
        url = make_url(told)
        backend = url.get_backend_name()
    except (ArgumentError, SQLAlchemyError, ValueError):
        raise HistoryError(_NO_URL) from None
    if "@" in (url.host or ""):  # the end of a password, which errors would show
        raise HistoryError(f"{_NO_URL}; '@' in a password is written %40")
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return URL.create("sqlite", database=url.database)
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise HistoryError(f"{backend}: a history is a file or a postgresql:// URL")


def _name(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def _sqlite(url: URL, busy_s: float, *, create: bool) -> Engine:
    path = Path(str(url.database))
    if not create and not path.exists():
        raise HistoryError(f"{path}: no history yet: tdxhw history add RESULTS")
    _make_private(path)
    engine = create_engine(url, connect_args={"timeout": busy_s})

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we begin transactions ourselves
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _make_private(path: Path) -> None:
    """Create the file for its user alone; refuse what is no SQLite file before SQLite sees it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise HistoryError(f"{path}: cannot open it: {error.strerror}") from error
    if head and head != _MAGIC:
        raise HistoryError(f"{path}: not an SQLite file; left as it is")


def _postgresql(url: URL) -> Engine:
    arguments: dict[str, Any] = {"connect_timeout": _CONNECT_S} if "connect_timeout" not in url.query else {}
    try:
        return create_engine(url, connect_args=arguments)
    except ImportError as error:
        raise HistoryError("PostgreSQL needs its driver: pip install 'tdxhw[postgresql]'") from error

"""The history as a file: private, never destroyed, and whatever is wrong with it is one line."""

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from tdxhw.history import queries
from tdxhw.history.database import Database, default_path
from tdxhw.history.errors import HistoryError
from tdxhw.history.queries import Wanted
from tdxhw.history.store import History, RunRecord
from tests.unit.report.samples import every_kind


def refused(where: str | Path) -> str:
    with pytest.raises(HistoryError) as error:
        History.open(where)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def add(path: Path) -> None:
    with History.open(path) as history:
        history.add(RunRecord(), every_kind())


def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "tdxhw" / "history.sqlite"
    before = os.umask(0o022)
    try:
        with History.open(path) as history:
            history.add(RunRecord(), every_kind())
            with history.database.writing():
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("history.sqlite", "history.sqlite-wal", "history.sqlite-shm"), 384)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_may_read_stays_as_its_user_wants_it(tmp_path: Path) -> None:
    path = tmp_path / "shared.sqlite"
    add(path)
    path.chmod(0o640)
    add(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_users_own_history_is_where_state_belongs() -> None:
    assert default_path({"XDG_STATE_HOME": "/s"}) == Path("/s/tdxhw/history.sqlite")
    assert default_path({}) == Path.home() / ".local/state/tdxhw/history.sqlite"


def test_a_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    add(path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM result")
    database = Database.open(path, busy_s=0.01)
    assert len(list(queries.export(database, Wanted()))) == 8
    database.close()
    writer.execute("ROLLBACK")
    writer.close()


def test_a_writer_that_does_not_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    add(path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    database = Database.open(path, busy_s=0.05)
    with pytest.raises(HistoryError, match=r"another process is writing and does not end; try again"):
        History(database).add(RunRecord(), every_kind())
    database.close()
    writer.close()


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\0" * 4096, b"SQLite format 2", b"{}"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert refused(path) == f"{path}: not an SQLite file; left as it is"
    assert path.read_bytes() == content
    assert names(tmp_path) == ["notes.txt"]


def test_an_sqlite_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (url)")
    other.commit()
    other.close()
    before = path.read_bytes()
    assert refused(path) == f"{path}: a database of something else (it has a table 'bookmarks'); left as it is"
    assert path.read_bytes() == before
    assert names(tmp_path) == ["places.sqlite"]


@pytest.mark.parametrize("damage", ["schema", "cut_off", "pages"])
def test_a_broken_file_is_told_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "history.sqlite"
    add(path)
    whole = path.read_bytes()
    match damage:
        case "schema":
            broken = whole[:100] + b"\xff" * 3996 + whole[4096:]
        case "cut_off":
            broken = whole[: 4096 * 3 + 100]
        case _:
            broken = whole[:4096] + b"\xa5" * (len(whole) - 4096)
    path.write_bytes(broken)
    with pytest.raises(HistoryError, match=r"the file is broken \(.*\); it is left as it is") as error:
        add(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == broken


def test_a_place_where_no_file_can_be_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path}: cannot open it: Is a directory"
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "history.sqlite"
    assert refused(below).startswith(f"{below}: cannot open it: ")
    assert refused("") == "the history has no name: give a file or a postgresql:// URL"


def test_a_question_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with pytest.raises(HistoryError, match="no history yet: tdxhw history add RESULTS"):
        History.open(path, create=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:s3cret@127.0.0.1:1/history", "postgres://me:s3cret@127.0.0.1:1/h?connect_timeout=2",
     "mysql://me:s3cret@host/history", "postgresql://me:s3cret@[::1/x", "nonsense://s3cret@",
     "postgresql://me:p@s3cret@127.0.0.1:1/history", "postgresql:/me:s3cret@127.0.0.1/history"],
)  # fmt: skip
def test_a_password_in_a_url_is_never_shown(url: str) -> None:
    told = refused(url)
    assert "s3cret" not in told
    assert len(told) > 20


def test_other_databases_are_refused_by_name() -> None:
    assert refused("mysql://host/history") == "mysql: a history is a file or a postgresql:// URL"
    assert refused("sqlite://") == "sqlite: a history is a file or a postgresql:// URL"

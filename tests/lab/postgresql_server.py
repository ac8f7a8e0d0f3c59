"""A PostgreSQL server of our own, on a socket in a temporary folder; it listens on no network."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path


def _programs() -> Path | None:
    """Return the folder of the newest server that is installed; distributions keep it off the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if folders:
        return folders[-1]
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def why_impossible() -> str:
    """Return why no server can be started here, empty if one can."""
    if _programs() is None:
        return "no PostgreSQL server: apt-get install postgresql"
    return (
        "" if os.geteuid() != 0 or _user() else "a PostgreSQL server does not run as root, and there is no other user"
    )


def _user() -> str | None:
    """Return whom the server runs as: it refuses root."""
    if os.geteuid() != 0:
        return None
    return next((name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()}), None)


@contextmanager
def server(folder: Path) -> Iterator[Callable[[], str]]:
    """Run a server in `folder`, which its user must reach; yield what makes an empty database and returns its URL."""
    programs, user = _programs(), _user()
    assert programs is not None
    data = folder / "data"
    if user is not None:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, check=True, user=user, timeout=120, stdout=subprocess.DEVNULL, cwd=folder)

    run("initdb", "--pgdata", str(data), "--username=tdxhw", "--auth=trust", "--no-sync", "--encoding=UTF8")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "start", "--pgdata", str(data), "--wait", "--options", options, "--log", str(folder / "log"))
    numbers = count()
    try:

        def new_database() -> str:
            name = f"history_{next(numbers)}"
            run("createdb", "--host", str(folder), "--username=tdxhw", name)
            return f"postgresql://tdxhw@/{name}?host={folder}"

        yield new_database
    finally:
        run("pg_ctl", "stop", "--pgdata", str(data), "--mode=immediate", "--wait")

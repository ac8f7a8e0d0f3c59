"""The lease of a lab host, kept on the host itself, so that no server has to be asked and none can be down.

Usage: ``lease.py FOLDER|- take|renew|release|show`` with a JSON object on standard input, one JSON object out.

Every operation holds an exclusive lock on one file for its whole length, so of two that race exactly one wins.
A lease has a token; only who has it can renew or release. An expired lease is taken over, and the new holder is
told from whom. Time is the host's own: nobody compares clocks over the network.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from typing import Any

NAME = "tdxhw.lease"


def choose_folder(folder: str) -> str:
    """Return `folder`, or for ``-`` one where every user of the host can take the lease."""
    if folder != "-":
        return folder
    everybody = "/run/lock"
    return everybody if os.path.isdir(everybody) and os.stat(everybody).st_mode & 0o002 else "/var/tmp"  # noqa: PTH112, PTH116, S108


def open_locked(folder: str) -> int:
    """Open the lease file and wait for its lock. Every user of the host may take the lease."""
    path = os.path.join(folder, NAME)  # noqa: PTH118
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Not with O_CREAT: in a sticky folder the kernel refuses that for other people's files (fs.protected_regular).
        fd = os.open(path, flags)
    except FileNotFoundError:
        old = os.umask(0)
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # somebody was faster
            fd = os.open(path, flags)
        finally:
            os.umask(old)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def load(fd: int) -> dict[str, Any] | None:
    """Return the lease, ``None`` if there is none. A file that was cut off by a full disk is no lease."""
    try:
        lease = json.loads(os.pread(fd, 65536, 0) or b"null")
    except ValueError:
        return None
    return lease if isinstance(lease, dict) and "token" in lease and "expires" in lease else None


def store(fd: int, lease: dict[str, Any] | None) -> None:
    """Replace the lease. Written over first and cut after, so that a full disk loses no old lease."""
    data = b"" if lease is None else json.dumps(lease).encode()
    if data:
        os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
    os.ftruncate(fd, len(data))
    os.fsync(fd)


def public(lease: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the lease without its token: it is not for others."""
    return None if lease is None else {key: value for key, value in lease.items() if key != "token"}


def operate(fd: int, operation: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Do one operation under the lock."""
    now = time.time()
    held = load(fd)
    is_live = held is not None and held["expires"] > now
    is_mine = held is not None and held["token"] == wish.get("token")
    if operation == "show":
        return {"ok": True, "holder": public(held), "live": is_live, "now": now}
    if operation == "take":
        if is_live and not is_mine:
            return {"ok": False, "holder": public(held), "now": now}
        lease = {
            "token": wish["token"],
            "owner": wish["owner"],
            "reason": wish["reason"],
            "taken": held["taken"] if held is not None and is_mine else now,
            "expires": now + wish["ttl_s"],
        }
        store(fd, lease)
        return {"ok": True, "taken_over": public(held) if held is not None and not is_mine else None, "now": now}
    if operation == "renew":
        # Expired and not yet taken by another: still ours.
        if held is None or not is_mine:
            return {"ok": False, "holder": public(held), "now": now}
        store(fd, dict(held, expires=now + wish["ttl_s"]))
        return {"ok": True, "now": now}
    if operation == "release":
        if held is not None and is_mine:
            store(fd, None)
        return {"ok": is_mine, "holder": None if is_mine else public(held), "now": now}
    raise ValueError(operation)


def main(arguments: list[str]) -> int:
    """Read the command line and the wish."""
    folder, operation = arguments
    fd = open_locked(choose_folder(folder))
    try:
        answer = operate(fd, operation, json.load(sys.stdin) if operation != "show" else {})
    finally:
        os.close(fd)
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

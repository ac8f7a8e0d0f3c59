"""The lease of a lab host, kept on the host itself, so that no server has to be asked and none can be down.

Usage: ``lease.py FOLDER|- take|renew|release|show`` with a JSON object on standard input, one JSON object out.

Every operation holds an exclusive lock on one file for its whole length, so of two that race exactly one wins.
A lease has a token; only who has it can renew or release. An expired lease is taken over, and the new holder is
told from whom. Time is the host's own: nobody compares clocks over the network. Within a boot it is counted from the
boot on, so that a clock that is set right does not end a lease or make it endless; after a reboot the host's clock has
to do, and no lease lasts longer from then on than it was taken for.

The file is gone with a reboot, and so is what it held the host for. A ``persistent`` lease (root's only) is for work
that goes on over reboots: it is on the disk, too, and counts wherever the first file has none.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from typing import Any

NAME = "tdxhw.lease"
KEPT = "/var/lib/tdxhw/lease"


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


def load(fd: int, kept: str) -> dict[str, Any] | None:
    """Return the lease, ``None`` if there is none. A file that was cut off by a full disk is no lease."""
    return parse(os.pread(fd, 65536, 0)) or parse(read(kept))


def read(path: str) -> bytes:
    """Return what is in a file, nothing if there is none."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


def parse(data: bytes) -> dict[str, Any] | None:
    """Return a lease, ``None`` if it is anything else."""
    try:
        lease = json.loads(data or b"null")
    except ValueError:
        return None
    return lease if isinstance(lease, dict) and "token" in lease and "expires" in lease else None


def boot_id() -> str:
    """Return what names this boot among all."""
    return read("/proc/sys/kernel/random/boot_id").decode("ascii", "replace").strip()


def since_boot() -> float:
    """Return a time that nobody sets [s]."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lasting(lease: dict[str, Any], ttl_s: float) -> dict[str, Any]:
    """Return the lease with `ttl_s` [s] left from now on, in this boot."""
    return dict(lease, expires=time.time() + ttl_s, boot=boot_id(), ends=since_boot() + ttl_s)


def adopt(fd: int, lease: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the lease with `expires` by the clock as it is now; one of an earlier boot counts in this one from now."""
    if lease is None or "boot" not in lease:  # an older tdxhw's, which renews `expires` alone
        return lease
    if lease["boot"] == boot_id():
        return dict(lease, expires=time.time() + lease["ends"] - since_boot())
    lease = lasting(lease, min(lease["expires"] - time.time(), lease.get("ttl_s", float("inf"))))
    write(fd, lease)
    return lease


def sync_folder(path: str) -> None:
    """Have on the disk which files are in a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def keep(path: str, lease: dict[str, Any] | None) -> None:
    """Have a persistent lease on the disk, whole or not at all, and no other."""
    folder = os.path.dirname(path)  # noqa: PTH120
    if lease is not None and lease.get("persistent"):
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103
        sync_folder(os.path.dirname(folder))  # noqa: PTH120
        partial = path + ".new"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(lease).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)  # noqa: PTH104
        sync_folder(folder)
    else:
        try:
            os.unlink(path)  # noqa: PTH108
            sync_folder(folder)
        except OSError:  # there is none; or it is root's, and then it has expired
            return


def store(fd: int, kept: str, lease: dict[str, Any] | None) -> None:
    """Replace the lease, also where it outlives a reboot."""
    keep(kept, lease)
    write(fd, lease)


def write(fd: int, lease: dict[str, Any] | None) -> None:
    """Replace the lease. Written over first and cut after, so that a full disk loses no old lease."""
    data = b"" if lease is None else json.dumps(lease).encode()
    if data:
        os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
    os.ftruncate(fd, len(data))
    os.fsync(fd)


def public(lease: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the lease without its token: it is not for others."""
    return None if lease is None else {key: value for key, value in lease.items() if key != "token"}


def operate(fd: int, kept: str, operation: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Do one operation under the lock."""
    now = time.time()
    held = adopt(fd, load(fd, kept))
    is_live = held is not None and held["expires"] > now
    if held is not None and "instead_of" in wish and held.get("process") == wish["instead_of"]:
        is_live = False  # who asks knows that its process has died
    is_mine = held is not None and held["token"] == wish.get("token")
    if operation == "show":
        return {"ok": True, "holder": public(held), "live": is_live, "now": now}
    if operation == "take":
        if is_live and not is_mine:
            return {"ok": False, "holder": public(held), "now": now}
        lease: dict[str, Any] = {
            "token": wish["token"],
            "owner": wish["owner"],
            "reason": wish["reason"],
            "taken": held["taken"] if held is not None and is_mine else now,
            "ttl_s": wish["ttl_s"],
            "process": wish.get("process", ""),
            "persistent": wish.get("persistent", False),
        }
        store(fd, kept, lasting(lease, wish["ttl_s"]))
        return {"ok": True, "taken_over": public(held) if held is not None and not is_mine else None, "now": now}
    if operation == "renew":
        # Expired and not yet taken by another: still ours.
        if held is None or not is_mine:
            return {"ok": False, "holder": public(held), "now": now}
        store(fd, kept, lasting(dict(held, ttl_s=wish["ttl_s"]), wish["ttl_s"]))
        return {"ok": True, "now": now}
    if operation == "release":
        if held is not None and is_mine:
            store(fd, kept, None)
        return {"ok": is_mine, "holder": None if is_mine else public(held), "now": now}
    raise ValueError(operation)


def main(arguments: list[str]) -> int:
    """Read the command line and the wish."""
    folder, operation = arguments
    fd = open_locked(choose_folder(folder))
    kept = KEPT if folder == "-" else os.path.join(folder, NAME + ".kept")  # noqa: PTH118
    try:
        answer = operate(fd, kept, operation, json.load(sys.stdin) if operation != "show" else {})
    finally:
        os.close(fd)
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

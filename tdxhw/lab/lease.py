"""Having a lab host to oneself: taken on the host, kept alive while in use, given back on any exit."""

import getpass
import json
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LabUnreachable, LeaseHeld, RemoteFailed

TTL_S: Final = 300.0
"""A lease that nobody renews is anybody's after this long [s]: the holder's machine may have died."""


def who_am_i() -> str:
    """Return ``user@machine pid 123``: enough to find whoever holds a host."""
    return f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}"


def this_process() -> str:
    """Return what names this process among all that ever ran: boot, process namespace, process id, when it began."""
    return _name(os.getpid()) or ""


def _name(pid: int) -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        began = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {pid} {began}"
    except OSError:
        return None


def _has_died(process: str) -> bool:
    """Whether a process was one of this machine, and runs no more. False where that cannot be known."""
    try:
        boot, namespace, pid, _ = process.split()
        ours = this_process().split()[:2]
        return ours == [boot, namespace] and _name(int(pid)) != process
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a host, in the host's own time."""

    owner: str
    reason: str
    taken: float
    expires: float
    now: float

    @classmethod
    def of(cls, lease: Mapping[str, Any], now: float) -> Self:
        """Read it from the host's answer."""
        return cls(str(lease["owner"]), str(lease["reason"]), float(lease["taken"]), float(lease["expires"]), now)

    def __str__(self) -> str:
        """``alice@ws pid 7 since 10:02 for 'tdxhw run', until 10:31 (in 299 s) unless renewed``."""
        since, until = (datetime.fromtimestamp(at).astimezone().strftime("%H:%M") for at in (self.taken, self.expires))
        left = max(0, round(self.expires - self.now))
        return f"{self.owner} since {since} for {self.reason!r}, until {until} (in {left} s) unless renewed"


class Lease:
    """A context in which the host is ours. `note` says from whom an expired lease was taken over."""

    def __init__(
        self, session: Session, reason: str, *, ttl_s: float = TTL_S, folder: str = "-", persistent: bool = False
    ) -> None:
        self.note = ""
        self._persistent = persistent  # over reboots of the host
        self._session = session
        self._reason = reason
        self._ttl_s = ttl_s
        self._folder = folder
        self._token = secrets.token_hex(16)
        self._done = threading.Event()
        self._keeper: threading.Thread | None = None

    def take(self) -> None:
        """Take the host, or raise ``LeaseHeld`` that says who has it until when.

        What a run on this machine left behind that has died is taken over at once.
        """
        wish = {"owner": who_am_i(), "reason": self._reason, "ttl_s": self._ttl_s, "process": this_process()}
        wish["persistent"] = self._persistent
        state = "expired"
        answer = self._ask("take", **wish)
        if not answer["ok"] and _has_died(died := str(answer["holder"].get("process", ""))):
            state = "abandoned"
            answer = self._ask("take", **wish, instead_of=died)
        if not answer["ok"]:
            holder = Holder.of(answer["holder"], answer["now"])
            raise LeaseHeld(f"{self._session.host.name} is taken by {holder}")
        if answer["taken_over"]:
            before = Holder.of(answer["taken_over"], answer["now"])
            self.note = f"{self._session.host.name}: took over the {state} lease of {before.owner} ({before.reason})"

    def move_to(self, session: Session) -> None:
        """Go on over another connection, after the first was lost. ``LeaseHeld`` if somebody else got the host."""
        self._session = session
        answer = self._ask("renew", ttl_s=self._ttl_s)
        if not answer["ok"]:
            self.take()

    def release(self) -> None:
        """Give the host back. Without a connection the lease runs out by itself."""
        try:
            self._ask("release")
        except (LabUnreachable, RemoteFailed):
            return

    def __enter__(self) -> Self:
        """Take the host and keep it."""
        self.take()
        self._keeper = threading.Thread(target=self._keep, name=f"lease of {self._session.host.name}", daemon=True)
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the host back, whatever happened."""
        self._done.set()
        if self._keeper is not None:
            self._keeper.join()
        self.release()

    def _keep(self) -> None:
        while not self._done.wait(self._ttl_s / 3):
            try:
                self._ask("renew", ttl_s=self._ttl_s)
            except (LabUnreachable, RemoteFailed):
                continue  # whoever uses the host notices, and may come back with another connection

    def _ask(self, operation: str, **wish: object) -> dict[str, Any]:
        text = json.dumps({"token": self._token, **wish}).encode()
        return _answer(self._session, self._folder, operation, text)


def _answer(session: Session, folder: str, operation: str, wish: bytes) -> dict[str, Any]:
    said = session.python("lease.py", folder, operation, stdin=wish)
    try:
        answer = json.loads(said)
    except ValueError:
        raise RemoteFailed(f"{session.host.name}: lease.py {operation} answered {said[:100]!r}") from None
    assert isinstance(answer, dict)
    return answer


def holder_of(session: Session, *, folder: str = "-") -> Holder | None:
    """Return who has the host now, ``None`` if it is free."""
    answer = _answer(session, folder, "show", b"")
    return Holder.of(answer["holder"], answer["now"]) if answer["live"] else None

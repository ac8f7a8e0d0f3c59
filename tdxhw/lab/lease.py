"""Having a lab host to oneself: taken on the host, kept alive while in use, given back on any exit."""

import getpass
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LabUnreachable, LeaseHeld, LeaseLost, RemoteFailed

TTL_S: Final = 300.0
"""A lease that nobody renews is anybody's after this long [s]: the holder's machine may have died."""

RENEW_S: Final = TTL_S / 3
"""How often it is renewed [s]; so long it may take until it is noticed that the host is somebody else's."""


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
    """A context in which the host is ours. `note` says from whom an expired lease was taken over.

    It can end before the context does: when it was not renewed in time (this machine slept, or had no network) and
    somebody else took the host, or when somebody removed its file. Then `check` says so.
    """

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
        self._sure_until = 0.0  # by `_now`
        self._is_stuck = False  # the connection that it had is gone
        self._lost = ""  # what happened to it

    def take(self) -> None:
        """Take the host, or raise ``LeaseHeld`` that says who has it until when.

        What a run on this machine left behind that has died is taken over at once.
        """
        self._take(self._session)

    def _take(self, session: Session) -> None:
        wish = {"owner": who_am_i(), "reason": self._reason, "ttl_s": self._ttl_s, "process": this_process()}
        wish["persistent"] = self._persistent
        state = "expired"
        answer = self._ask(session, "take", **wish)
        if not answer["ok"] and _has_died(died := str(answer["holder"].get("process", ""))):
            state = "abandoned"
            answer = self._ask(session, "take", **wish, instead_of=died)
        if not answer["ok"]:
            holder = Holder.of(answer["holder"], answer["now"])
            raise LeaseHeld(f"{session.host.name} is taken by {holder}")
        if answer["taken_over"]:
            before = Holder.of(answer["taken_over"], answer["now"])
            self.note = f"{session.host.name}: took over the {state} lease of {before.owner} ({before.reason})"

    def move_to(self, session: Session) -> None:
        """Go on over another connection, after the first was lost. ``LeaseLost`` if somebody else got the host.

        If nobody has it by now (an ordinary lease is gone with a reboot), it is taken again.
        """
        if self._lost:
            raise LeaseLost(self._lost)
        if not self._ask(session, "renew", ttl_s=self._ttl_s)["ok"]:
            try:
                self._take(session)
            except LeaseHeld as error:
                self._lost = f"{error}: it is not ours any more, so nothing more is done to it"
                raise LeaseLost(self._lost) from error
        self._is_stuck = False
        self._session = session  # only now: the keeper is not to ask over it for what is not there yet

    def check(self, session: Session | None) -> None:
        """Raise ``LeaseLost`` if the host is not ours any more, as far as is known. `session` is about to be used.

        If the lease was not renewed in time, or cannot be over the connection that it had, it is renewed over
        `session`. Without one, a lease that has run out is as good as lost.
        """
        if self._lost:
            raise LeaseLost(self._lost)
        has_run_out = _now() > self._sure_until
        if session is not None and (has_run_out or self._is_stuck):
            self.move_to(session)
        elif has_run_out:
            raise LeaseLost(f"{self._session.host.name}: our lease has run out, and it cannot be asked who has it now")

    def release(self) -> None:
        """Give the host back. Without a connection the lease runs out by itself."""
        self._done.set()
        try:
            self._ask(self._session, "release")
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
        while not self._done.wait(min(RENEW_S, self._ttl_s / 3)):
            try:
                self._renew(self._session)
            except (LabUnreachable, RemoteFailed):
                self._is_stuck = True  # whoever uses the host has another connection, or comes back with one

    def _renew(self, session: Session) -> None:
        answer = self._ask(session, "renew", ttl_s=self._ttl_s)
        if answer["ok"] or session is not self._session or self._done.is_set():
            return
        name = session.host.name
        if answer["holder"] is None:
            what = f"{name}: somebody removed our lease"
        else:
            what = f"{name} is taken by {Holder.of(answer['holder'], answer['now'])}"
        self._lost = f"{what}: it is not ours any more, so nothing more is done to it"

    def _ask(self, session: Session, operation: str, **wish: object) -> dict[str, Any]:
        asked = _now()
        text = json.dumps({"token": self._token, **wish}).encode()
        answer = _answer(session, self._folder, operation, text)
        if answer["ok"]:
            self._sure_until = asked + self._ttl_s
        return answer


def _now() -> float:
    """Return a time that nobody sets, and that goes on while this machine sleeps [s]."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


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

"""Having a lab host to oneself through a labgrid place, where a lab is shared by way of a labgrid coordinator.

``lease: {driver: labgrid, place: NAME}`` in a lab file uses it instead of the lease on the host. A place has no
expiry: what a killed run leaves acquired, somebody has to release (``labgrid-client -p NAME release --kick``).
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LabUnreachable, LeaseHeld, LeaseLost, RemoteFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.lease import RENEW_S

_TIMEOUT_S: Final = 30
_ACQUIRED: Final = re.compile(r"^\s+acquired: (\S+)$", re.MULTILINE)
_NOT_OURS: Final = ("already acquired", "acquired by a different user", "reserved")


class LabgridPlace:
    """A context in which the place of a host is acquired by us. Of many that race the coordinator lets one win."""

    note = ""

    def __init__(self, host: Host) -> None:
        assert host.lease is not None
        self._host = host
        self._place = str(host.lease.options["place"])
        self._coordinator = str(host.lease.options.get("coordinator", ""))
        self._owner = ""
        self._lost = ""
        self._done = threading.Event()
        self._keeper: threading.Thread | None = None

    def take(self) -> None:
        """Acquire the place, or raise ``LeaseHeld`` that says who has it."""
        done = self._client("acquire")
        if done.returncode != 0:
            said = _last_line(done)
            if any(sign in said for sign in _NOT_OURS):
                raise LeaseHeld(f"{self._host.name} is taken: labgrid: {said}")
            raise self._failed(done)
        self._owner = self.holder()

    def move_to(self, session: Session) -> None:
        """Go on over another connection. ``LeaseLost`` if somebody kicked us out meanwhile."""
        with suppress(LabUnreachable, RemoteFailed):  # a coordinator that does not answer gives it to nobody else
            self._see_who_has_it()
        self.check(session)

    def check(self, session: Session | None) -> None:  # noqa: ARG002 (a place knows no connection)
        """Raise ``LeaseLost`` if somebody kicked us out, as far as is known."""
        if self._lost:
            raise LeaseLost(self._lost)

    def _see_who_has_it(self) -> None:
        holder = self.holder()
        if self._done.is_set() or (self._owner and holder == self._owner):
            return
        self._owner = ""
        self._lost = (
            f"{self._host.name}: its labgrid place {self._place} was taken away by {holder or 'nobody'}: it is not "
            "ours any more, so nothing more is done to it"
        )

    def _keep(self) -> None:
        while not self._lost and not self._done.wait(RENEW_S):
            with suppress(LabUnreachable, RemoteFailed):
                self._see_who_has_it()

    def release(self) -> None:
        """Release the place if we have it; somebody else's stays."""
        self._done.set()
        if self._owner:
            self._owner = ""
            self._client("release")

    def holder(self) -> str:
        """Return who has the place, as ``machine/user``; nothing if it is free."""
        done = self._client("show")
        if done.returncode != 0:
            raise self._failed(done)
        found = _ACQUIRED.search(done.stdout)
        return found[1] if found and found[1] != "None" else ""

    def __enter__(self) -> Self:
        """Acquire it, and look now and then whether it is still ours."""
        self.take()
        self._keeper = threading.Thread(target=self._keep, name=f"place of {self._host.name}", daemon=True)
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it, whatever happened."""
        self.release()

    def _client(self, *command: str) -> "subprocess.CompletedProcess[str]":
        beside = Path(sys.executable).with_name("labgrid-client")
        program = str(beside) if beside.exists() else shutil.which("labgrid-client")
        if program is None:
            raise LabUnreachable(f"{self._host.name}: its lease is a labgrid place: pip install 'tdxhw[labgrid]'")
        coordinator = ["-x", self._coordinator] if self._coordinator else []
        argv = [program, *coordinator, "-p", self._place, *command]
        try:
            return subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
                env=os.environ | {"NO_COLOR": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LabUnreachable(
                f"{self._host.name}: the labgrid coordinator did not answer within {_TIMEOUT_S} s"
            ) from None

    def _failed(self, done: "subprocess.CompletedProcess[str]") -> LabUnreachable | RemoteFailed:
        said = _last_line(done)
        if "coordinator" in said:
            where = self._coordinator or os.environ.get("LG_COORDINATOR", "") or "its default place"
            return LabUnreachable(f"{self._host.name}: no labgrid coordinator at {where}")
        return RemoteFailed(f"{self._host.name}: labgrid: {said}")


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("labgrid-client: ").removeprefix("Error: ")

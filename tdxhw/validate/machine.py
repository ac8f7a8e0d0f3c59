"""The host that a kernel is tried on: what it is, what is changed on it, and how it comes back.

A connection lives as long as a boot; the machine outlives it.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tdxhw.lab.connection import Completed
from tdxhw.lab.errors import LabUnreachable, RemoteFailed
from tdxhw.validate.errors import ChangeFailed

FOLDER: Final = "/var/lib/tdxhw/validate"
"""On the host: the journal, what was uploaded, the guard's log. Gone once everything is undone."""

_POLL_S: Final = 3.0
_BRIEF_S: Final = 20.0  # more, and the connection is one to a boot that is over
_WHOLE_S: Final = 120.0
_SHUTDOWN_S: Final = 8.0
_GOING_DOWN_S: Final = 180.0  # services may take their time to stop: systemd gives each 90 s
# Detached, so that the command has an end before the connection has. Never by way of kexec: that would pass GRUB by.
_REBOOT: Final = (
    "nohup sh -c 'sleep 1; SYSTEMCTL_SKIP_AUTO_KEXEC=1 systemctl reboot || reboot || /sbin/reboot' "
    ">/dev/null 2>&1 </dev/null &"
)


class Link(Protocol):
    """An open connection to the host; `tdxhw.lab.connection.Session` is one."""

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60) -> Completed:
        """Run a shell command."""
        ...

    def python(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 60, package: str = "") -> str:
        """Run one of our scripts there."""
        ...

    def upload(self, data: bytes, path: str) -> None:
        """Write a file there."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Clock:
    """Time that passes by itself. Tests have one that they move."""

    def now(self) -> float:
        """Return a time that only grows [s]."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait [s]."""
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Boot:
    """What tells one boot of a host from another."""

    release: str
    build_id: str  # nothing where the kernel does not show it
    boot_id: str
    cmdline: str

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Boot":
        """Read it from what `survey.py` says."""
        names = ("release", "build_id", "boot_id", "cmdline")
        return cls(*(str(facts.get(name) or "") for name in names))

    def __str__(self) -> str:
        """``7.2.13-good (build id 1f2e3d4c…)``."""
        return f"{self.release} (build id {self.build_id[:12]}…)" if self.build_id else self.release


class Machine:
    """One host over however many connections."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Link],
        *,
        clock: Clock | None = None,
        on_connected: Callable[[Link], None] = lambda _link: None,
    ) -> None:
        self.name = name
        self.clock = clock or Clock()
        self.on_connected = on_connected
        """Called with every new connection; the lease moves to it."""
        self.see_that_it_is_ours: Callable[[Link | None], None] = lambda _link: None
        """Called before a connection, or without one power control, is used: ``LeaseLost`` if it is somebody else's."""
        self._connect = connect
        self._link: Link | None = None

    # ---- connections ----

    @property
    def link(self) -> Link:
        """The connection; a new one if the last was lost or there was none. ``LabUnreachable`` if it cannot be had."""
        if self._link is not None:
            self.see_that_it_is_ours(self._link)
        else:
            link = self._connect()
            try:
                self.on_connected(link)
            except BaseException:
                link.close()
                raise
            self._link = link
        return self._link

    def drop(self) -> None:
        """Close the connection, if there is one."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    # ---- what it is ----

    def boot(self) -> Boot:
        """Say which boot this is."""
        return Boot.of(self._survey("brief", _BRIEF_S))

    def survey(self) -> dict[str, Any]:
        """Say everything that a validation looks at or could change."""
        return self._survey("whole", _WHOLE_S)

    def _survey(self, how_much: str, limit_s: float) -> dict[str, Any]:
        answer = json.loads(self.link.python("survey.py", how_much, timeout_s=limit_s, package="tdxhw.validate.remote"))
        assert isinstance(answer, dict)
        return answer

    def text(self, path: str) -> str:
        """Return a file of the host, nothing if there is none."""
        return self.link.run(f"cat {path} 2>/dev/null || :").stdout

    def is_folder(self, path: str) -> bool:
        """Whether a folder is there."""
        return self.link.run(f"test -d {path}").exit_code == 0

    def hkids_used(self) -> int | None:
        """Return how many HKIDs TDs have now, None where the misc cgroup does not count them."""
        words = (line.split() for line in self.text("/sys/fs/cgroup/misc.current").splitlines())
        return next((int(number) for name, number in words if name == "tdx"), None)

    # ---- what is changed on it ----

    def journal(self) -> list[dict[str, Any]]:
        """Return what an unfinished validation wrote down, nothing if there is none."""
        lines = self._operate("show", {})["lines"]
        assert isinstance(lines, list)
        return lines

    def begin(self, head: Mapping[str, object]) -> None:
        """Start a journal."""
        self._operate("begin", head)

    def change(self, kind: str, *, limit_s: float = 600, **details: object) -> dict[str, Any]:
        """Make one change that can be taken back. ``ChangeFailed`` says why it was refused or did not work."""
        return self._operate("do", {"change": kind, **details}, limit_s)

    def undo(self) -> list[str]:
        """Take everything back; return what could not be, one line each."""
        self._make_sure()
        answer = json.loads(self._journal("undo", b"", 3600))
        failed = [*answer.get("failed", []), *([answer["error"]] if "error" in answer else [])]
        return [str(line) for line in failed]

    def end(self) -> None:
        """Remove the journal and whatever was uploaded. ``ChangeFailed`` while something is not undone."""
        self._operate("end", {})

    def upload(self, data: bytes, name: str) -> str:
        """Bring a file into the journal's folder; return where it is."""
        path = f"{FOLDER}/files/{name}"
        self.link.upload(data, path)
        return path

    def _operate(self, operation: str, wish: Mapping[str, object], limit_s: float = 600) -> dict[str, Any]:
        answer = json.loads(self._journal(operation, json.dumps(wish).encode(), limit_s))
        assert isinstance(answer, dict)
        if not answer["ok"]:
            raise ChangeFailed(f"{self.name}: {wish.get('change', operation)}: {answer.get('error', 'had no effect')}")
        return answer

    def _journal(self, operation: str, wish: bytes, limit_s: float) -> str:
        return self.link.python(
            "journal.py", FOLDER, operation, stdin=wish, timeout_s=limit_s, package="tdxhw.validate.remote"
        )

    def _make_sure(self) -> None:
        """Ask whether the host is ours: what follows would be a bad surprise to somebody else. ``LeaseLost`` if not."""
        self.on_connected(self.link)

    # ---- how it comes back ----

    def reboot(self) -> None:
        """Tell it to reboot; what follows is for `wait_for_boot`."""
        self._make_sure()
        self.link.run(_REBOOT)
        self.drop()

    def answer(self, limit_s: float) -> Boot | None:
        """Return which boot it is in, connecting if need be; None if it does not say within `limit_s` [s]."""
        return self._await(lambda _boot: True, limit_s)

    def wait_for_boot(self, before: str, limit_s: float) -> Boot | None:
        """Wait for another boot than the one with the id `before`; None if there is none within `limit_s` [s].

        ``ChangeFailed`` if it still answers from the old boot long after it was told to reboot.
        """
        still_there_until = self.clock.now() + min(limit_s, _GOING_DOWN_S)

        def is_another(boot: Boot) -> bool:
            if boot.boot_id != before:
                return True
            self.drop()
            if self.clock.now() > still_there_until:
                raise ChangeFailed(f"{self.name}: was told to reboot and did not go down")
            return False

        self.clock.sleep(_SHUTDOWN_S)  # a connection to a host that goes down is one more to wait for the end of
        return self._await(is_another, limit_s - _SHUTDOWN_S)

    def _await(self, is_wanted: Callable[[Boot], bool], limit_s: float) -> Boot | None:
        until = self.clock.now() + limit_s
        while True:
            try:
                boot = self.boot()
            except (LabUnreachable, RemoteFailed):
                self.drop()
            else:
                if is_wanted(boot):
                    return boot
            if self.clock.now() > until:
                return None
            self.clock.sleep(_POLL_S)

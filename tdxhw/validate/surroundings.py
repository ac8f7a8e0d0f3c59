"""What a validation needs of the world: the way to the host, its power, console and lease, and running suites there.

Tests put a simulated host in its place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import Session
from tdxhw.lab.console import Capture, open_console
from tdxhw.lab.host_run import Rescue, Wish
from tdxhw.lab.hosts import Host
from tdxhw.lab.labgrid_place import LabgridPlace
from tdxhw.lab.lease import TTL_S, Lease
from tdxhw.lab.power import Power, open_power
from tdxhw.report.results import Results
from tdxhw.validate.errors import Refused
from tdxhw.validate.machine import Clock, Link
from tdxhw.validate.suites import Suites

_LEASE_BOOTS: Final = 4  # a lease lasts as long as this many boots that nobody answers from


class Holding(AbstractContextManager["Holding"], Protocol):
    """A host that is ours while this is entered."""

    note: str

    def move_to(self, session: Any) -> None:
        """Go on over another connection. ``LeaseLost`` if it is not ours any more."""
        ...

    def check(self, session: Any) -> None:
        """Raise ``LeaseLost`` if it is not ours any more, as far as is known; `session` is about to be used."""
        ...


class Surroundings(Protocol):
    """The world of one validation."""

    clock: Clock

    def connect(self) -> Link:
        """Open a connection to the host. ``LabUnreachable`` if there is none to be had now."""
        ...

    def power(self) -> Power | None:
        """Return its power switch, None without one. ``PowerFailed`` if it cannot be used."""
        ...

    def console(self) -> Capture | None:
        """Return its console, None without one."""
        ...

    def hold(self, link: Link, reason: str) -> Holding:
        """Return what makes the host ours, over reboots."""
        ...

    def run_suites(
        self,
        base: Results,
        name: str,
        collected: list[Results],
        up_again: Callable[[], None],
        rescue: Callable[[float], Rescue],
    ) -> list[str]:
        """Run the suites; return what infrastructure failed.

        What was found is in `collected`, also when this ends with ``KeyboardInterrupt``.
        `up_again` has the kernel on trial running again after a test took the host down, `rescue` resets a host that
        does not answer any more.
        """
        ...


@dataclass(slots=True)
class LabSurroundings:
    """A real lab host."""

    host: Host
    labs: Path
    ssh_config: Path | None
    boot_limit_s: float
    out: Path | None = None
    archive: Archive | None = None
    wish: Wish = field(default_factory=Wish)
    retries: int = 0
    token: str = ""
    say: Callable[[str], None] = print
    clock: Clock = field(default_factory=Clock)
    _lease: Lease | LabgridPlace | None = None

    def connect(self) -> Session:
        """Open a connection."""
        return Session.open(self.host, self.labs, ssh_config=self.ssh_config)

    def power(self) -> Power | None:
        """Return the power switch of its lab file."""
        return open_power(self.host)

    def console(self) -> Capture | None:
        """Return the console of its lab file; without one, the kernel log over SSH."""
        if self.out is None:
            return None
        return open_console(self.host, self.out / "console.log", labs=self.labs, ssh_config=self.ssh_config)

    def hold(self, link: Link, reason: str) -> Lease | LabgridPlace:
        """Return its lease. ``Refused`` if we may not do there what a validation has to."""
        if (user := link.run("id -u").stdout.strip()) != "0":
            raise Refused(
                f"{self.host.name}: installing a kernel needs root, and ssh takes us to user {user or 'unknown'}: "
                "`ssh: root@…` in its lab file"
            )
        if self.host.lease is not None:
            self._lease = LabgridPlace(self.host)
        else:
            assert isinstance(link, Session)
            ttl_s = TTL_S + _LEASE_BOOTS * self.boot_limit_s
            self._lease = Lease(link, reason, ttl_s=ttl_s, persistent=True)
        return self._lease

    def run_suites(
        self,
        base: Results,
        name: str,
        collected: list[Results],
        up_again: Callable[[], None],
        rescue: Callable[[float], Rescue],
    ) -> list[str]:
        """Run them over SSH, as `tdxhw run --on lab:NAME` does."""
        assert self.archive is not None
        assert self.out is not None
        assert self._lease is not None

        def after_reboot(session: Session) -> Session:
            session.close()
            up_again()
            return self.connect()

        suites = Suites(
            self.host, self.labs, self.ssh_config, self.archive, self.wish, self.out, self.token, self.retries,
            self._lease, self.say, after_reboot, rescue,
        )  # fmt: skip
        try:
            suites.run(base, name, collected)
        finally:
            problems = suites.problems
        return problems

"""One run on one lab host: lease, deploy, run there, stream results; go on after a lost connection.

Results that arrived are never lost and their tests never run twice. A test during which the host rebooted has failed
and is not tried again: it would take the host down again. One during which the host lost its power is tried again, as
after a lost connection; if the power goes a second time, it is the test that does it.
"""

import json
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from tdxhw.errors import HarnessError
from tdxhw.lab import kernel_marks, own_suites
from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import TIME_LIMIT, Session
from tdxhw.lab.deploy import Deployed, deploy
from tdxhw.lab.errors import ConnectionLost, LabUnreachable, LeaseLost, RemoteFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.labgrid_place import LabgridPlace
from tdxhw.lab.lease import Lease
from tdxhw.lab.went_down import POWER_WENT_AGAIN, REBOOTED
from tdxhw.report.results import Result, Status

RECONNECT_S: Final = 300.0  # a server's firmware takes its time to boot [s]
_RECONNECT_EVERY_S: Final = 3.0
_LOOK_S: Final = 1.0  # how often is looked whether the host is still ours
_BOOT_ID: Final = "cat /proc/sys/kernel/random/boot_id"
_LAST_WORDS: Final = (  # of the kernel that went down, where the host keeps them
    "cat /sys/fs/pstore/dmesg-* 2>/dev/null | tail -n 40 || :; "
    # where systemd-pstore moves them as the next kernel boots
    "find /var/lib/systemd/pstore -name dmesg.txt -mmin -60 -exec tail -n 40 {} + 2>/dev/null || :; "
    "timeout 20 journalctl -k -b -1 -n 40 --no-pager 2>/dev/null || :"
)
_RUNS: Final = 5  # a host that loses its connection more often is lost


@dataclass(frozen=True, slots=True)
class Wish:
    """What to run on each host."""

    suites: tuple[str, ...] = ()
    promises: tuple[str, ...] = ()
    keyword: str = ""
    time_limit_s: float = 120.0  # [s] per test
    left_out: tuple[str, ...] = ()  # files of suites that another host runs

    def with_suites(self, suites: tuple[str, ...]) -> "Wish":
        """Return the wish for some of the suites."""
        return replace(self, suites=suites)

    def without_files(self, files: tuple[str, ...]) -> "Wish":
        """Return the wish without the suites of some files."""
        return replace(self, left_out=files)


class Rescue(Enum):
    """What it took to have a host back that did not answer."""

    NOTHING = "nothing was done"
    RESET = "reset: it hung"
    SWITCHED_ON = "switched on: its power was off"


@dataclass(slots=True)
class HostRun:
    """The run on one host, and what came of it."""

    host: Host
    wish: Wish
    log: Path  # results as they arrive, in the format of pytest-reportlog
    labs: Path
    run_id: str
    archive: Archive
    ssh_config: Path | None = None
    on_result: Callable[[str, str, str], None] = lambda _host, _test, _outcome: None
    on_note: Callable[[str], None] = lambda _note: None
    stop: threading.Event = field(default_factory=threading.Event)
    held: Lease | LabgridPlace | None = None  # a lease of the caller's, who gives the host back
    marks: bool = False  # of each test, in the kernel log there
    after_reboot: Callable[[Session], Session] | None = None
    """What has to happen before the run goes on after a reboot; returns the connection to go on with."""
    rescue: Callable[[float], Rescue] = lambda _waited_s: Rescue.NOTHING
    """Asked again and again while the host does not answer, since `waited_s` [s]; tells what it did."""
    problem: str = ""  # why the host could not do its work, in one line
    exit_code: int | None = None
    _done: dict[str, None] = field(default_factory=dict)  # node ids whose tear-down arrived, in order
    _running: dict[str, Any] | None = None  # the last report of a test whose tear-down is still to come
    _provenance: dict[str, str] = field(default_factory=dict)  # of the host, as the last session there gave it
    _ended: bool = False
    _was_off: bool = False  # its power, since the connection was lost
    _cut_off: set[str] = field(default_factory=set)  # node ids of tests under which the power went once

    def run(self) -> None:
        """Do everything. Never raises: `problem` says what went wrong."""
        try:
            with self._connect() as session:
                if self.held is not None:
                    self._run_under(self.held, session)
                    return
                lease = self._lease(session)
                with lease:
                    if lease.note:
                        self.on_note(lease.note)
                    self._run_under(lease, session)
        except HarnessError as error:
            self.problem = str(error)
        except Exception as error:  # noqa: BLE001 (of a thread that dies nobody would hear, and all would seem well)
            self.problem = f"{self.host.name}: {type(error).__name__}: {error}"
        finally:
            if self.problem:
                with suppress(OSError):  # our disk is full, which is the problem
                    self._write(self._missing(self.problem).to_json())

    def _lease(self, session: Session) -> Lease | LabgridPlace:
        if self.host.lease is not None:
            return LabgridPlace(self.host)
        return Lease(session, f"tdxhw run {' '.join(self.wish.suites)}".strip())

    def _connect(self) -> Session:
        return Session.open(self.host, self.labs, ssh_config=self.ssh_config)

    def _reconnect(self, why: ConnectionLost) -> Session:
        self.on_note(f"{why}; trying to reconnect")
        since = time.monotonic()
        until = since + RECONNECT_S
        while not self.stop.wait(_RECONNECT_EVERY_S):
            try:
                return self._connect()
            except LabUnreachable:
                done = self.rescue(time.monotonic() - since)
                if done is not Rescue.NOTHING:
                    self._was_off |= done is Rescue.SWITCHED_ON
                    until = time.monotonic() + RECONNECT_S
                if time.monotonic() > until:
                    raise LabUnreachable(f"{why}, and it did not come back within {RECONNECT_S:g} s") from why
        raise LabUnreachable(f"{why}; interrupted")

    def _run_under(self, lease: Lease | LabgridPlace, session: Session) -> None:
        """Run until the session on the host has its end, over as many connections as it takes."""
        opened: list[Session] = []
        deadline = time.monotonic() + self.host.limits.run_timeout_s
        try:
            boot_id = session.check(_BOOT_ID)
            log, seen = "", _Bytes()
            lost: ConnectionLost | None = None
            for attempt in range(_RUNS):
                try:
                    if lost is not None:
                        session = self._reconnect(lost)
                        opened.append(session)
                        lease.move_to(session)
                        now_id = self._after_the_loss(session, log, seen, boot_id)
                        if self._ended:
                            break
                        if now_id != boot_id and self.after_reboot is not None:
                            session = self.after_reboot(session)
                            opened.append(session)
                            now_id = session.check(_BOOT_ID)
                        boot_id = now_id
                    deployed = deploy(session, self.archive)
                    folder = f"{deployed.cache}/runs/{self.run_id}"
                    log, seen = f"{folder}/report-{attempt}.jsonl", _Bytes()
                    argv = self._argv(session, deployed, folder, log)
                    self._follow(session, lease, argv, log, seen, deadline)
                    break
                except ConnectionLost as error:
                    if attempt == _RUNS - 1 or self.stop.is_set():
                        raise
                    lost = error
        finally:
            if self.held is None:
                lease.release()
            for one in opened:
                one.close()

    def _argv(self, session: Session, deployed: Deployed, folder: str, log: str) -> Sequence[str]:
        session.check(f"mkdir -p {shlex.quote(folder)}")
        promises = dict.fromkeys([*self.host.promises, *self.wish.promises])
        marked = ["env", f"{kernel_marks.ASKED_FOR}=1"] if self.marks else []
        argv = [*marked, *deployed.command, "run", "--on", "local", "--report-log", log]
        argv += ["--time-limit", str(min(self.wish.time_limit_s, self.host.limits.test_timeout_s))]
        argv += [word for promise in promises for word in ("--promise", promise)]
        if self.wish.keyword:
            argv += ["-k", self.wish.keyword]
        if self._done or self.wish.left_out:
            done = f"{folder}/done"
            session.upload("".join(f"{one}\n" for one in (*self.wish.left_out, *self._done)).encode(), done)
            argv += ["--done", done]
        return [*argv, *own_suites.send(session, self.wish.suites, f"{folder}/suites")]

    def _follow(
        self,
        session: Session,
        lease: Lease | LabgridPlace,
        argv: Sequence[str],
        log: str,
        seen: "_Bytes",
        deadline: float,
    ) -> None:
        console: list[str] = []
        watch = _Watch(lease, session)
        self.exit_code = session.supervise(
            argv,
            limit_s=max(1.0, deadline - time.monotonic()),
            follow=log,
            on_line=lambda line: self._take(line, seen),
            on_console=console.append,
            stop=lambda: self.stop.is_set() or watch.is_lost(),
        )
        if watch.lost is not None:
            raise watch.lost
        if self.stop.is_set():
            self.problem = f"{self.host.name}: interrupted"
        elif self.exit_code == TIME_LIMIT:
            self.problem = (
                f"{self.host.name}: the run took longer than {self.host.limits.run_timeout_s} s and was ended"
            )
        elif not self._ended:
            silence = f"tdxhw ended there with {self.exit_code}, without a word and without results"
            said = next((line.strip() for line in reversed(console) if line.strip()), silence)
            self.problem = f"{self.host.name}: {said.removeprefix('tdxhw: ')}"
        elif self.exit_code not in (0, 1):
            said = next((line.strip() for line in reversed(console) if line.strip()), "")
            self.problem = f"{self.host.name}: tdxhw ended with {self.exit_code}: {said.removeprefix('tdxhw: ')}"

    def _after_the_loss(self, session: Session, log: str, seen: "_Bytes", boot_id: str) -> str:
        """Fetch what was written but did not arrive; find out whether the host rebooted."""
        now_id = session.check(_BOOT_ID)
        if log:
            self._wait_for_the_end(session, log)
            rest = session.run(f"tail -c +{seen.count + 1} {shlex.quote(log)}", timeout_s=120)
            if rest.exit_code == 0:
                whole, _, _ = rest.stdout.rpartition("\n")
                for line in whole.splitlines():
                    self._take(line, seen)
        if now_id != boot_id and self._running is not None:
            self._blame(session, self._running)
        self._was_off = False
        return now_id

    def _blame(self, session: Session, test: dict[str, Any]) -> None:
        """Say what the test has to do with it that the host went down."""
        nodeid = str(test["nodeid"])
        if self._was_off and nodeid not in self._cut_off:
            self.on_note(f"{self.host.name}: lost its power during {nodeid}, which is tried again")
            self._cut_off.add(nodeid)
            self._running = None
            return
        self.on_note(f"{self.host.name}: rebooted during {nodeid}; it is not tried again")
        try:
            last_words = session.run(_LAST_WORDS).stdout
        except RemoteFailed as error:  # what the test did is known without them
            last_words = str(error)
        self._fail(test, POWER_WENT_AGAIN if self._was_off else REBOOTED, last_words)

    def _wait_for_the_end(self, session: Session, log: str) -> None:
        """Wait until the supervisor of the lost connection has ended the run: two must not use /dev/kvm at once."""
        pattern = shlex.quote(log.replace("/", "[/]"))  # not this command itself
        for _ in range(60):
            # grep: not every host has pgrep, and one without it would look like one on which nothing runs.
            if session.run(f"grep -sqae {pattern} /proc/[0-9]*/cmdline").exit_code != 0:
                return
            time.sleep(1)
        raise RemoteFailed(f"{self.host.name}: the run of the lost connection does not end")

    # ---- results ----

    def _take(self, line: str, seen: "_Bytes") -> None:
        """Keep one line of the report log, with the host's name in it."""
        seen.count += len(line.encode()) + 1
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            self.on_note(f"{self.host.name}: a line of its report is broken: {line[:80]!r}")
            return
        match record.get("$report_type"):
            case "SessionStart":
                self._provenance = next(iter(record.get("hosts", {}).values()), {})
            case "TestStart":
                self._running = self._begun(record)
            case "TestReport":
                nodeid = str(record["nodeid"])
                record["user_properties"].append(["tdxhw.host", self.host.name])
                self._running = record
                if record["when"] == "teardown":
                    self._done[nodeid] = None
                    self._running = None
                if record["when"] == "call" or record["outcome"] != "passed":
                    self.on_result(self.host.name, nodeid, str(record["outcome"]))
            case "SessionFinish":
                self._ended = True
        self._write(record)

    def _begun(self, start: dict[str, Any]) -> dict[str, Any]:
        """Return a report of a test of which nothing is known yet but that it has begun."""
        properties = [[f"tdxhw.{key}", value] for key, value in self._provenance.items()]
        return {
            "$report_type": "TestReport",
            "nodeid": start["nodeid"],
            "when": "setup",
            "outcome": "passed",
            "longrepr": None,
            "user_properties": [*properties, ["tdxhw.host", self.host.name]],
            "sections": [],
            "keywords": {},
            "location": [str(start["nodeid"]).partition("::")[0], None, str(start["nodeid"]).partition("::")[2]],
            "start": start.get("start", 0.0),
            "duration": 0.0,
        }

    def _fail(self, test: dict[str, Any], why: str, details: str) -> None:
        """Record what the test cannot record itself: it did not live to see it."""
        for when, outcome, text in (("call", "failed", f"{details}\n{why}".lstrip()), ("teardown", "passed", None)):
            if when == test["when"] == "call":
                continue  # its own verdict came; the host went down after it
            self._write(test | {"when": when, "outcome": outcome, "longrepr": text, "duration": 0.0, "sections": []})
        self.on_result(self.host.name, str(test["nodeid"]), "failed")
        self._done[str(test["nodeid"])] = None
        self._running = None

    def _write(self, record: object) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _missing(self, why: str) -> Result:
        provenance = {"backend": "local", "host": self.host.name}
        return Result(
            "lab", "(host)", self.host.name, Status.MISS, started=time.time(), message=why, provenance=provenance
        )


@dataclass(slots=True)
class _Bytes:
    """How much of a file has arrived."""

    count: int = 0


@dataclass(slots=True)
class _Watch:
    """Looks now and then whether the host is still ours, while something runs there."""

    lease: Lease | LabgridPlace
    session: Session
    lost: LeaseLost | None = None
    _looked: float = field(default_factory=time.monotonic)

    def is_lost(self) -> bool:
        """Whether it is somebody else's."""
        if self.lost is None and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            try:
                self.lease.check(self.session)
            except LeaseLost as error:
                self.lost = error
            except (LabUnreachable, RemoteFailed):
                return False  # what runs there notices, too, that the connection is lost
        return self.lost is not None

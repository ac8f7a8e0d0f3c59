"""What becomes of a test during which its host goes down: one that reboots, one that lost its power, one that hangs.

The host is a script: each connection to it runs the next part, and ends as that says.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from tdxhw.lab import host_run
from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import Completed
from tdxhw.lab.deploy import Deployed
from tdxhw.lab.errors import ConnectionLost, LabUnreachable, LeaseLost, RemoteFailed
from tdxhw.lab.host_run import HostRun, Rescue, Wish
from tdxhw.lab.hosts import Host, SshTarget
from tdxhw.lab.went_down import POWER_WENT_AGAIN, REBOOTED
from tdxhw.report.read import read
from tdxhw.report.results import Status

SUITE = ("test_s.py::test_a", "test_s.py::test_b", "test_s.py::test_c")


@dataclass
class ScriptedHost:
    """Runs what is left of the suite over each connection, until it goes down."""

    goes_down_in: list[str]  # tests, one for each time
    answers_after: int = 0  # attempts to connect
    reboots: bool = True
    boots: int = 1
    phase: str = "call"  # in which it goes down
    journal_is_slow: bool = False
    ran: list[str] = field(default_factory=list)
    _attempts: int = 0
    _uploaded: str = ""

    # ---- as a session ----

    def open(self) -> Self:
        self._attempts += 1
        if self.boots > 1 and self._attempts <= self.answers_after:
            raise LabUnreachable("vm: no answer")
        self._attempts = 0
        return self

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self, command: str, **_: object) -> str:
        return f"boot-{self.boots}\n" if "boot_id" in command else ""

    def run(self, command: str, **_: object) -> Completed:
        if "journalctl" in command and self.journal_is_slow:
            raise RemoteFailed("vm: still running after 60 s: journalctl")
        return Completed(1 if command.startswith("grep -sqae") else 0, "", "")

    def upload(self, data: bytes, path: str) -> None:
        self._uploaded = data.decode()

    def supervise(self, argv: Sequence[str], *, on_line: Callable[[str], None], **_: object) -> int:
        def tell(**record: Any) -> None:
            on_line(json.dumps(record))

        tell(**{"$report_type": "SessionStart", "hosts": {"local": {"kernel": "7.2.13-trial"}}})
        for nodeid in SUITE:
            if "--done" in argv and nodeid in self._uploaded.splitlines():
                continue
            self.ran.append(nodeid)
            tell(**{"$report_type": "TestStart", "nodeid": nodeid, "start": 1000.0})
            for when in ("setup", "call", "teardown"):
                if when == self.phase and self.goes_down_in[:1] == [nodeid]:
                    del self.goes_down_in[0]
                    self.boots += self.reboots
                    raise ConnectionLost("vm: the connection is lost")
                report = {"nodeid": nodeid, "when": when, "outcome": "passed", "longrepr": None, "duration": 0.1}
                tell(**{"$report_type": "TestReport", "user_properties": [], "sections": [], **report})
        tell(**{"$report_type": "SessionFinish"})
        return 0


class Held:
    """A lease of the caller's."""

    def move_to(self, session: object) -> None:
        pass

    def check(self, session: object) -> None:
        pass


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[HostRun, dict[str, list[Any]]]]:
    monkeypatch.setattr(host_run, "_RECONNECT_EVERY_S", 0.001)
    monkeypatch.setattr(host_run, "deploy", lambda _session, _archive: Deployed("python3", "/app", "/c", False))

    def run(host: ScriptedHost, **options: Any) -> tuple[HostRun, dict[str, list[Any]]]:
        monkeypatch.setattr(HostRun, "_connect", lambda _self: host.open())
        one = HostRun(
            Host("vm", SshTarget("vm", "root", 22), "test:1"), Wish(), tmp_path / "log.jsonl", tmp_path, "t",
            Archive(b"", "0", ()), held=Held(), **options,  # type: ignore[arg-type]
        )  # fmt: skip
        one.run()
        results: dict[str, list[Any]] = {}
        for result in read(one.log).results:
            results.setdefault(result.test, []).append((result.status, result.message))
        return one, results

    return run


PASSED = [(Status.PASS, "")]


def test_a_test_during_which_the_host_rebooted_has_failed_and_is_not_tried_again(go: Any) -> None:
    host = ScriptedHost([SUITE[1]])
    run, results = go(host)
    assert run.problem == ""
    assert results == {"test_a": PASSED, "test_b": [(Status.FAIL, REBOOTED)], "test_c": PASSED}
    assert host.ran == list(SUITE)


def test_a_test_whose_set_up_takes_the_host_down_has_failed_and_is_not_tried_again(go: Any, tmp_path: Path) -> None:
    host = ScriptedHost([SUITE[1]], phase="setup")
    run, results = go(host)
    assert run.problem == ""
    assert results == {"test_a": PASSED, "test_b": [(Status.FAIL, REBOOTED)], "test_c": PASSED}
    assert host.ran == list(SUITE), "each of them once: what crashes a kernel crashes it again"
    failed = next(one for one in read(run.log).results if one.test == "test_b")
    assert (failed.host, failed.provenance["kernel"], failed.started) == ("vm", "7.2.13-trial", 1000.0)


def test_the_last_words_of_the_kernel_are_not_worth_the_run(go: Any) -> None:
    run, results = go(ScriptedHost([SUITE[1]], journal_is_slow=True))
    assert run.problem == ""
    assert results == {"test_a": PASSED, "test_b": [(Status.FAIL, REBOOTED)], "test_c": PASSED}


def test_a_test_that_hung_the_host_so_that_it_was_reset_has_failed(go: Any) -> None:
    _, results = go(ScriptedHost([SUITE[1]], answers_after=3), rescue=lambda _: Rescue.RESET)
    assert results["test_b"] == [(Status.FAIL, REBOOTED)]


def test_a_test_under_which_the_power_went_is_tried_again_and_counts_as_that(go: Any) -> None:
    host = ScriptedHost([SUITE[1]], answers_after=3)
    waited: list[float] = []

    def rescue(waited_s: float) -> Rescue:
        waited.append(waited_s)
        return Rescue.SWITCHED_ON if len(waited) == 2 else Rescue.NOTHING

    run, results = go(host, rescue=rescue)
    assert run.problem == ""
    assert results == dict.fromkeys(("test_a", "test_b", "test_c"), PASSED)
    assert host.ran == [SUITE[0], SUITE[1], SUITE[1], SUITE[2]]
    assert waited == sorted(waited)
    assert len(waited) == 3, "asked at each attempt that failed"


def test_a_test_that_switches_the_host_off_has_failed_the_second_time(go: Any) -> None:
    host = ScriptedHost([SUITE[1], SUITE[1]], answers_after=2)
    run, results = go(host, rescue=lambda _: Rescue.SWITCHED_ON)
    assert run.problem == ""
    assert results["test_b"] == [(Status.FAIL, POWER_WENT_AGAIN)]
    assert host.ran == [SUITE[0], SUITE[1], SUITE[1], SUITE[2]]


def test_a_power_cut_excuses_no_other_test(go: Any) -> None:
    host = ScriptedHost([SUITE[0], SUITE[1]], answers_after=2)
    rescues = iter((Rescue.SWITCHED_ON, Rescue.NOTHING, Rescue.NOTHING, Rescue.NOTHING))
    _, results = go(host, rescue=lambda _: next(rescues))
    assert results == {"test_a": PASSED, "test_b": [(Status.FAIL, REBOOTED)], "test_c": PASSED}


def test_what_has_to_happen_after_a_reboot_happens_after_each(go: Any) -> None:
    host = ScriptedHost([SUITE[0], SUITE[1]])
    called: list[int] = []

    def after_reboot(session: Any) -> Any:
        called.append(host.boots)
        return session

    go(host, after_reboot=after_reboot)
    assert called == [2, 3]


def test_a_connection_that_was_only_lost_is_no_reboot(go: Any) -> None:
    host = ScriptedHost([SUITE[0], SUITE[1]], reboots=False)
    _, results = go(host, after_reboot=lambda _: pytest.fail("it did not reboot"))
    assert results == dict.fromkeys(("test_a", "test_b", "test_c"), PASSED)


def test_the_last_test_may_take_the_host_down(go: Any) -> None:
    run, results = go(ScriptedHost([SUITE[2]]))
    assert run.problem == ""
    assert results["test_c"] == [(Status.FAIL, REBOOTED)]


def test_tdxhw_that_says_nothing_there_is_a_problem_that_names_itself(go: Any) -> None:
    host = ScriptedHost([])
    host.supervise = lambda *_, **__: 0  # type: ignore[method-assign]
    run, _ = go(host)
    assert run.problem == "vm: tdxhw ended there with 0, without a word and without results"


def test_a_run_ends_when_the_host_is_somebody_else_s_and_keeps_what_it_has(
    go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_run, "_LOOK_S", 0.0)

    class Taken(ScriptedHost):
        """Somebody takes it under the second test."""

        def supervise(self, argv: Sequence[str], *, on_line: Callable[[str], None], **more: Any) -> int:
            def tell(line: str) -> None:
                if not self.is_taken:
                    on_line(line)
                self.is_taken |= '"TestStart"' in line and SUITE[1] in line
                self.was_asked_to_end |= more["stop"]()

            super().supervise(argv, on_line=tell)
            return 125 if self.was_asked_to_end else 0

        is_taken = was_asked_to_end = False

    host = Taken([])

    def check(_self: Held, session: object) -> None:
        assert session is host
        if host.is_taken:
            raise LeaseLost("vm is taken by bob@ws pid 7")

    monkeypatch.setattr(Held, "check", check)
    run, results = go(host)
    assert host.was_asked_to_end
    assert run.problem == "vm is taken by bob@ws pid 7"
    assert results["test_a"] == PASSED
    assert [status for status, _ in results["test_b"]] == [Status.MISS], "no failure: it was not the test's fault"
    assert results["(host)"] == [(Status.MISS, "vm is taken by bob@ws pid 7")]


@pytest.mark.parametrize("marks", [True, False])
def test_only_who_reads_the_kernel_log_has_the_tests_marked_in_it(go: Any, marks: bool) -> None:
    ran: list[str] = []

    class Listed(ScriptedHost):
        """Remembers what it runs."""

        def supervise(self, argv: Sequence[str], *, on_line: Callable[[str], None], **more: Any) -> int:
            ran.extend(argv)
            return super().supervise(argv, on_line=on_line, **more)

    go(Listed([]), marks=marks)
    assert (ran[:3] == ["env", "TDXHW_KERNEL_MARKS=1", "python3"]) is marks
    assert ("TDXHW_KERNEL_MARKS=1" in ran) is marks

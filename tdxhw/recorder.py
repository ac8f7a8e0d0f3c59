"""Collect a run's results from pytest's hooks, and show them as they come."""

import time
from collections.abc import Generator
from typing import Protocol

import pytest

from tdxhw.errors import GuestError
from tdxhw.results import Result, RunRecord
from tdxhw.session_state import suite_of
from uapi_ctypes.errors import BackendLimit, KvmError


class Display(Protocol):
    """What shows a run to the user."""

    def started(self, record: RunRecord) -> None:
        """Show the header: where the results will come from."""

    def collected(self, record: RunRecord) -> None:
        """Learn how many tests will run."""

    def running(self, suite: str, test: str) -> None:
        """Show what runs now."""

    def finished_test(self, result: Result) -> None:
        """Show one result."""

    def finished(self, record: RunRecord) -> None:
        """Show failures and the summary."""


class Recorder:
    """A pytest plugin that fills a `RunRecord`."""

    def __init__(self, record: RunRecord, display: Display) -> None:
        self.record = record
        self.problem = ""
        """Why the session itself could not go on (collection error, broken promise), in one line."""
        self._display = display
        self._headlines: dict[str, str] = {}
        self._current: dict[str, Result] = {}
        self._start = time.monotonic()

    def pytest_sessionstart(self) -> None:
        """Show the header."""
        self._display.started(self.record)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember why a suite could not even be read."""
        if report.failed:
            last = report.longreprtext.strip().splitlines()
            self.problem = f"{report.nodeid}: {last[-1].removeprefix('E').strip() if last else 'cannot be collected'}"

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        """Say in our one line what pytest cannot make sense of: a ``-k`` expression, a file that is no suite."""
        try:
            return (yield)
        except pytest.UsageError as error:
            pytest.exit(headline_of_usage(error), returncode=2)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn how many tests will run."""
        self.record.planned = len(session.items)
        self._display.collected(self.record)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show what runs now: a test that hangs is named on the screen."""
        self._display.running(suite_of(nodeid), test_of(nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember the one line that says what failed: the exception knows it better than its traceback."""
        report = yield
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self._headlines[item.nodeid] = headline(call.excinfo.value)
            if isinstance(call.excinfo.value, BackendLimit):
                report.longrepr = story_of_limit(call.excinfo, item)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Merge set-up, call and tear-down of a test into one result."""
        result = self._current.get(report.nodeid)
        if result is None:
            test, host = split_host(test_of(report.nodeid))
            result = Result(suite_of(report.nodeid), test, host, "passed", 0.0)
            self._current[report.nodeid] = result
        result.duration_s += report.duration
        if report.skipped:
            result.outcome, result.reason = "skipped", skip_reason(report)
        elif report.failed:
            # A test that failed stays "failed" even when its tear-down then has trouble as well.
            if result.outcome != "failed":
                result.outcome = "failed" if report.when == "call" else "error"
                result.reason = self._headlines.get(report.nodeid, "")
            result.details += report.longreprtext + "\n"
            result.details += "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
        if report.when == "teardown":
            result.duration_s = round(result.duration_s, 6)
            result.provenance = {
                key.removeprefix("tdxhw."): str(value)
                for key, value in report.user_properties
                if key.startswith("tdxhw.")
            }
            self.record.results.append(self._current.pop(report.nodeid))
            self._display.finished_test(result)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Tell Ctrl-C from a session that ended itself: pytest reports both here."""
        if isinstance(excinfo.value, pytest.exit.Exception):
            self.problem = str(excinfo.value.msg)
        elif not isinstance(excinfo.value, pytest.Session.Interrupted):  # a suite could not be read
            self.record.interrupted = True

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
        """Say in one line what broke; `excinfo` has the rest for whoever debugs the harness."""
        self.problem = f"internal error: {headline(excinfo.value)} at {excinfo.traceback[-1]}"
        return True

    def pytest_sessionfinish(self) -> None:
        """Note how long it took. Called on Ctrl-C too."""
        self.record.duration_s = time.monotonic() - self._start


def headline(error: BaseException) -> str:
    """Return the line to show first: for a failed ioctl the whole story, else type and first line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, KvmError | GuestError):
        return text
    if isinstance(error, BackendLimit):
        return f"the simulator cannot go on: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def story_of_limit(error: pytest.ExceptionInfo[BaseException], item: pytest.Item) -> str:
    """Say what the simulator lacks and which line of the test met it; the simulator's own frames help nobody."""
    frames = [entry for entry in error.traceback if entry.path == item.path]
    place = f"{item.path.name}:{frames[-1].lineno + 1}: {str(frames[-1].statement).strip()}\n" if frames else ""
    return place + headline(error.value)


def headline_of_usage(error: pytest.UsageError) -> str:
    """Return pytest's complaint in one line."""
    return str(error).partition("\n")[0].replace("Wrong expression passed to '-k'", "-k") or "pytest cannot use that"


def skip_reason(report: pytest.TestReport) -> str:
    """Return the reason that was given with the skip."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def test_of(nodeid: str) -> str:
    """Return the part of a node id after its file."""
    return nodeid.partition("::")[2]


def split_host(test: str) -> tuple[str, str]:
    """Split ``test_x[mainline-4]`` into ``test_x[4]`` and ``mainline``; the host comes first in the id."""
    name, bracket, rest = test.partition("[")
    if not bracket:
        return test, ""
    host, _, others = rest.removesuffix("]").partition("-")
    return (f"{name}[{others}]" if others else name), host

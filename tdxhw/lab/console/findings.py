"""Find what a kernel complained about in what its console said, and say during which test.

Works on a serial line as it is: with and without printk's time stamps, levels and caller ids; several CPUs at once;
torn lines; other people's text between. Takes time linear in the size of the log and never raises.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tdxhw.lab.console import finding_kinds
from tdxhw.lab.console.finding_kinds import BEGINNINGS, CUT_HERE, END, KINDS, MAYBE, NEW_BOOT, RULE, Beginning
from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.lab.went_down import TOOK_THE_HOST_DOWN
from tdxhw.report.results import Result, Status
from uapi_ctypes.tdx_status import describe

__all__ = ["KINDS", "Finding", "scan", "tie"]

_LONGEST: Final = 1100  # [characters] of a line that are looked at: printk's longest and its prefix
_MOST_LINES: Final = 200  # of one report
_LONGEST_PAUSE_S: Final = 10.0  # within one report: a serial line is slow, but goes on
_LATE_S: Final = 2.0  # what a console may lag behind the test that is running

# "<4>[   12.345678][  T123] text": level, time, caller (PRINTK_CALLER); each may be missing.
_PREFIX: Final = re.compile(r"(?:<\d{1,3}>)?(?:\[ {0,11}\d{1,11}\.\d{6}\] ?)?(?:\[ {0,9}(?P<caller>[TC]\d{1,9})\] ?)?")
_NEXT_LINE: Final = re.compile(r"\[ {0,11}\d{1,11}\.\d{6}\]")
_NUMBER: Final = re.compile(r"\[(#\d+)\]")
_NO_MESSAGE: Final = re.compile(r"Modules linked in|CPU: |Hardware name|RIP: |Call Trace|Tainted: ")
_STATUS: Final = re.compile(r"(?:failed: |leaf \d{1,5}, error )(0x[0-9a-fA-F]{1,16})\b")


@dataclass(frozen=True, slots=True)
class Finding:
    """One complaint of the kernel."""

    kind: str  # one of `KINDS`
    at: float  # [s since 1970] of its first line, by this machine's clock
    text: str  # what it is, in one line without time and caller
    lines: tuple[str, ...]  # the whole report as it came
    decoded: str = ""  # of a failed SEAMCALL: its completion status in words
    test: str = ""  # what was running: "suite::test"; see `tie`


@dataclass(slots=True)
class _Report:
    """A report that is still being printed."""

    at: float
    last_at: float
    kind: str = ""  # nothing after "cut here", until a line says what it is
    text: str = ""
    message: str = ""  # what WARN(condition, message) prints between "cut here" and the line that says where
    number: str = ""  # of an oops: "#1"
    goes_on_with: re.Pattern[str] | None = None
    lines: list[str] = field(default_factory=list)
    is_about_seamcall: bool = False
    status: int | None = None

    def add(self, line: ConsoleLine, body: str = "") -> None:
        """Take a line that belongs to it; `body` if the line may be the message of a WARN."""
        before = not self.kind  # to 6.18 it comes before the line that says where, from 6.19 on after it
        after = self.kind == "warning" and len(self.lines) == 2 and not _NO_MESSAGE.match(body)
        if body and not self.message and (before or after):
            self.message = body.strip()
        self.lines.append(line.text)
        self.last_at = line.at

    def finding(self) -> Finding:
        kind, text = self.kind or "warning", self.text
        if self.is_about_seamcall:
            kind, text = "seamcall", self.message
        elif self.message and kind == "warning":
            text = f"{self.message}; {text}" if text else self.message
        decoded = describe(self.status) if self.status is not None else ""
        return Finding(kind, self.at, text or CUT_HERE, tuple(self.lines), decoded)


def scan(lines: Iterable[ConsoleLine]) -> list[Finding]:
    """Return every complaint in `lines`, in the order in which they began."""
    scanner = _Scanner()
    for line in lines:
        scanner.take(line)
    return sorted(scanner.end(), key=lambda finding: finding.at)


def tie(findings: Iterable[Finding], results: Sequence[Result], *, host_ahead_s: float = 0.0) -> list[Finding]:
    """Return the findings with the name of the test that was running, where one was.

    `results` are those of the same host. Their times are by the host's clock, which is `host_ahead_s` [s] ahead of
    the clock of this machine.
    """
    timed = sorted((result for result in results if result.started), key=lambda result: result.started)
    starts = [result.started - host_ahead_s for result in timed]
    return [replace(finding, test=_running_at(finding.at, timed, starts)) for finding in findings]


def _running_at(at: float, timed: Sequence[Result], starts: Sequence[float]) -> str:
    position = bisect_right(starts, at) - 1
    if position < 0:
        return ""
    result = timed[position]
    # A test that took its host down knows nothing of its end: the host was not there to tell.
    cut_off = result.status is Status.MISS or result.message in TOOK_THE_HOST_DOWN
    return result.name if cut_off or at <= starts[position] + result.duration_s + _LATE_S else ""


class _Scanner:
    """Takes a console line by line. One report may be open per caller; without PRINTK_CALLER all are one caller."""

    def __init__(self) -> None:
        self._open: dict[str, _Report] = {}
        self._findings: list[Finding] = []

    def end(self) -> Iterable[Finding]:
        """Return what was found."""
        for caller in list(self._open):
            self._close(caller)
        return self._findings

    def take(self, line: ConsoleLine) -> None:
        """Take the next line."""
        text = line.text[:_LONGEST]
        prefix = _PREFIX.match(text)
        caller, body = ((prefix["caller"] or ""), text[prefix.end() :]) if prefix else ("", text)
        report = self._open.get(caller)
        if report is not None and (
            line.at - report.last_at > _LONGEST_PAUSE_S
            or len(report.lines) >= _MOST_LINES
            or (report.goes_on_with is not None and not report.goes_on_with.search(body))
        ):
            self._close(caller)
            report = None
        if MAYBE.search(body):
            self._take_event(line, body, caller, report)
        elif report is not None:
            report.add(line, body)

    def _take_event(self, line: ConsoleLine, body: str, caller: str, report: _Report | None) -> None:
        if NEW_BOOT.search(body):
            for one in list(self._open):
                self._close(one)
            return
        if CUT_HERE in body:
            self._close(caller)
            self._open[caller] = _Report(line.at, line.at, lines=[line.text])
            return
        if END.search(body) or (RULE.search(body) and report and report.kind in finding_kinds.HAVE_A_RULE_AT_THE_END):
            if report is not None:
                report.add(line)
                self._close(caller)
            return
        begun = _beginning(body)
        if begun is None:
            if report is not None:
                report.add(line, body)
            return
        beginning, what = begun
        number = _NUMBER.search(body)
        if report is None or not _goes_on(report, beginning, number[1] if number else ""):
            self._close(caller)
            report = self._open[caller] = _Report(
                line.at, line.at, beginning.kind, what, goes_on_with=beginning.goes_on_with
            )
        elif beginning.kind == "seamcall":  # the message of a WARN
            report.message, report.is_about_seamcall = what, True
        elif not report.kind:
            report.kind, report.text = beginning.kind, what
        report.add(line)
        report.number = number[1] if number else report.number
        status = _STATUS.search(body) if beginning.kind == "seamcall" else None
        if status is not None:
            report.status = int(status[1], 16)

    def _close(self, caller: str) -> None:
        report = self._open.pop(caller, None)
        if report is not None:
            self._findings.append(report.finding())


def _beginning(body: str) -> tuple[Beginning, str] | None:
    for beginning in BEGINNINGS:
        match = beginning.pattern.search(body)
        if match:
            start = match.start() if body[match.start()].isalnum() else 0
            glued = _NEXT_LINE.search(body, match.end())  # a line whose end was lost
            end = glued.start() if glued else None
            if beginning.kind == "seamcall" and (status := _STATUS.search(body, start)):
                end = status.end()  # addresses follow: they would make each of them look like another failure
            return beginning, body[start:end].strip()
    return None


def _goes_on(report: _Report, beginning: Beginning, number: str) -> bool:
    """Return whether a line that could begin a report belongs to the open one."""
    if not report.kind:
        return True
    match report.kind, beginning.kind:
        case "oops", "oops":  # "BUG: unable to handle…", then "Oops: 0002 [#1]"
            return bool(number) and report.number in ("", number)
        case "lockdep", "warning":  # DEBUG_LOCKS_WARN_ON(…), then where
            return "DEBUG_LOCKS_WARN_ON" in report.text
        case "rcu-stall", "rcu-stall":
            return "kthread" in report.text or "kthread" in beginning.pattern.pattern
        case "warning", "seamcall":  # WARN(…, "SEAMCALL … failed") from 6.19 on
            return len(report.lines) == 2 and not report.message
        case "machine-check", "machine-check":
            return True
        case _:
            return False

"""Find what a kernel complained about in what its console said, and say during which test.

Works on a serial line as it is: with and without printk's time stamps, levels and caller ids; several CPUs at once;
torn lines; other people's text between. Takes time linear in the size of the log and never raises.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tdxhw.lab import kernel_marks
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
_DISORDER_S: Final = 5.0  # lines of several CPUs may come in another order; a time further back is another boot's

# "<4>[   12.345678][  T123] text": level, time, caller (PRINTK_CALLER); each may be missing.
_PREFIX: Final = re.compile(
    r"(?:<\d{1,3}>)?(?:\[ {0,11}(?P<stamp>\d{1,11}\.\d{6})\] ?)?(?:\[ {0,9}(?P<caller>[TC]\d{1,9})\] ?)?"
)
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
    host_at: float | None = None  # [s since 1970] of its first line by the host's clock, where a mark tells


class _Marks:
    """What the marks of one boot say about its clock."""

    def __init__(self) -> None:
        self._latest = float("-inf")
        self._stamps: list[float] = []  # growing
        self._ahead: list[float] = []  # of each: what the host's clock was ahead of printk's [s]

    def is_of_this_boot(self, stamp: float) -> bool:
        """Take in printk's time of the next line; say whether it is of the same boot."""
        if stamp < self._latest - _DISORDER_S:
            return False
        self._latest = max(self._latest, stamp)
        return True

    def add(self, stamp: float | None, body: str) -> None:
        """Take a mark; one that is torn, or out of order, says nothing."""
        at = kernel_marks.marked_time(body)
        if at is not None and stamp is not None and stamp >= (self._stamps or [stamp])[-1]:
            self._stamps.append(stamp)
            self._ahead.append(at - stamp)

    def host_time(self, stamp: float | None) -> float | None:
        """Return the host's time for one of printk's, by the mark before it, or else by the first."""
        if stamp is None or not self._stamps:
            return None
        return stamp + self._ahead[max(0, bisect_right(self._stamps, stamp) - 1)]


@dataclass(slots=True)
class _Report:
    """A report that is still being printed."""

    at: float
    last_at: float
    stamp: float | None  # printk's time of its first line [s]
    marks: "_Marks"  # of its boot
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
        host_at = self.marks.host_time(self.stamp)
        return Finding(kind, self.at, text or CUT_HERE, tuple(self.lines), decoded, host_at=host_at)


def scan(lines: Iterable[ConsoleLine]) -> list[Finding]:
    """Return every complaint in `lines`, in the order in which they began."""
    scanner = _Scanner()
    for line in lines:
        scanner.take(line)
    return sorted(scanner.end(), key=lambda finding: finding.at)


def tie(findings: Iterable[Finding], results: Sequence[Result], *, host_ahead_s: float = 0.0) -> list[Finding]:
    """Return the findings with the name of the test that was running, where one was.

    `results` are those of the same host. Their times are by the host's clock, and so is that of a finding in a log
    with marks (`tdxhw.lab.kernel_marks`). Without any, it has to do when its line came, by the clock of this machine,
    which the host's is `host_ahead_s` [s] ahead of.
    """
    timed = sorted((result for result in results if result.started), key=lambda result: result.started)
    starts = [result.started for result in timed]
    times = ((one, one.at + host_ahead_s if one.host_at is None else one.host_at) for one in findings)
    return [replace(finding, test=_running_at(at, timed, starts)) for finding, at in times]


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
        self._closed: list[_Report] = []
        self._marks = _Marks()
        self._stamp: float | None = None  # of the line that is taken

    def end(self) -> Iterable[Finding]:
        """Return what was found."""
        for caller in list(self._open):
            self._close(caller)
        return [report.finding() for report in self._closed]

    def take(self, line: ConsoleLine) -> None:
        """Take the next line."""
        text = line.text[:_LONGEST]
        prefix = _PREFIX.match(text)
        caller, body = ((prefix["caller"] or ""), text[prefix.end() :]) if prefix else ("", text)
        self._stamp = float(prefix["stamp"]) if prefix and prefix["stamp"] else None
        if self._stamp is not None and not self._marks.is_of_this_boot(self._stamp):
            self._marks = _Marks()
        if kernel_marks.is_ours(body):
            self._marks.add(self._stamp, body)
            return
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
            self._marks = _Marks()
            return
        if CUT_HERE in body:
            self._close(caller)
            self._open[caller] = _Report(line.at, line.at, self._stamp, self._marks, lines=[line.text])
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
                line.at, line.at, self._stamp, self._marks, beginning.kind, what, goes_on_with=beginning.goes_on_with
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
            self._closed.append(report)


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

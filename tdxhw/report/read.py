"""Read results: a report log of `tdxhw run --report-log` (pytest-reportlog), JSON lines of ours, or `run --json`.

A run that was killed leaves a log without its end. What is in it counts; a test that had begun is a ``MISS``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tdxhw.report.errors import ReportError
from tdxhw.report.results import Result, Results, Status, merge, texts

_PROVENANCE: Final = "tdxhw."
_MESSAGE_LIMIT: Final = 300

# A test that dies of these has a mistake of its own; everything else that it raises is what it found out.
_MISTAKES: Final = frozenset(
    {
        "AttributeError",
        "ImportError",
        "ModuleNotFoundError",
        "NameError",
        "SyntaxError",
        "TypeError",
        "UnboundLocalError",
    }
)
# The host or the way to it was lost.
_INFRASTRUCTURE: Final = frozenset(
    {"BackendUnavailable", "ConnectionLost", "LabUnreachable", "LeaseHeld", "PromiseBroken"}
)
_MALFORMED: Final = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading runs into where a line is JSON, but not what it should be."""
_RUN_STATUS: Final = {
    "passed": Status.PASS,
    "failed": Status.FAIL,
    "error": Status.ERROR,
    "skipped": Status.SKIP,
    "missed": Status.MISS,
    "xfailed": Status.XFAIL,
}


def read_all(paths: Iterable[Path]) -> Results:
    """Return the results of several files as one."""
    return merge(read(path) for path in paths)


def read(path: Path) -> Results:
    """Return the results in `path`. ``ReportError`` names the line that is no result."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: cannot read it: {error.strerror}") from error
    # A power cut may leave anything in the last line; it is dropped below.
    whole, newline, last = data.rpartition(b"\n")
    try:
        text = (whole + newline).decode("utf-8") + last.decode("utf-8", "replace" if newline else "strict")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not UTF-8 text") from error
    if not text.strip():
        raise ReportError(f"{path}: empty: the run wrote no result")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and "results" in document:
        return _from_run_document(path, document)
    return _from_lines(path, text)


def _from_run_document(path: Path, document: Mapping[str, Any]) -> Results:
    try:
        results = tuple(
            Result(
                suite=str(one["suite"]),
                test=str(one["test"]),
                host=str(one["host"]),
                status=_RUN_STATUS[one["outcome"]],
                duration_s=float(one["duration_s"]),
                started=float(document.get("started", 0.0)),
                message=str(one["reason"]),
                details=str(one["details"]),
                provenance=texts(one["provenance"]),
            ).checked()
            for one in document["results"]
        )
    except _MALFORMED as error:
        raise ReportError(f"{path}: not what `tdxhw run --json` prints: {error!r}") from error
    notes = [f"{path}: the run was interrupted"] if document.get("interrupted") else []
    return Results(results, (str(path),), tuple(notes))


def _from_lines(path: Path, text: str) -> Results:
    log = _ReportLog()
    results: list[Result] = []
    notes: list[str] = []
    lines = text.split("\n")  # splitlines() would also split at U+2028 and its like, which JSON strings may have
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "$report_type" in record:
                results.extend(log.add(record))
            else:
                results.append(Result.from_json(record))
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1 and not text.endswith("\n"):
                notes.append(f"{path} ends in the middle of a line: the run was cut off")
                break
            raise ReportError(f"{path}:{number}: not JSON: {error.msg}") from error
        except _MALFORMED as error:
            raise ReportError(f"{path}:{number}: not a result: {error!r}") from error
    if log.began:
        results.extend(log.unfinished())
        if not log.ended and not notes:
            notes.append(f"{path} has no end: the run was cut off")
    return Results(tuple(results), (str(path),), tuple(notes))


class _ReportLog:
    """Puts set-up, call and tear-down of each test back together."""

    def __init__(self) -> None:
        self.began = False
        self.ended = False
        self._start = 0.0  # of the session [s since 1970]
        self._hosts: dict[str, dict[str, str]] = {}
        self._phases: dict[str, list[Mapping[str, Any]]] = {}
        self._cut: dict[str, list[Mapping[str, Any]]] = {}

    def add(self, record: Mapping[str, Any]) -> list[Result]:
        """Take in one line; return the result that it completes."""
        match record["$report_type"]:
            case "SessionStart":
                self.began, self.ended = True, False
                self._cut.update(self._phases)  # of a connection that was lost; run again, they count as that
                self._phases.clear()
                self._start = float(record.get("start", 0.0))
                self._hosts = {name: texts(provenance) for name, provenance in record.get("hosts", {}).items()}
            case "SessionFinish":
                self.ended = True
            case "CollectReport" if record["outcome"] == "failed":
                suite = suite_of(record["nodeid"])
                headline, details = _failure(record)
                host, shared = self._everywhere()
                broken = Result(suite, "(collection)", host, Status.ERROR, 0.0, self._start, headline, details, shared)
                return [broken.checked()]
            case "TestStart":  # before its set-up, which may be its end
                nothing_yet = {"when": "start", "outcome": "passed", "duration": 0.0, "longrepr": None}
                self._phases[record["nodeid"]] = [{**record, **nothing_yet, "user_properties": []}]
            case "TestReport":
                phases = self._phases.setdefault(record["nodeid"], [])
                phases.append(record)
                if record["when"] == "teardown":
                    self._cut.pop(record["nodeid"], None)
                    return [self._result(self._phases.pop(record["nodeid"]))]
        return []

    def _everywhere(self) -> tuple[str, dict[str, str]]:
        """Return the run's host, if it is one, and what is the same for all: a suite that broke ran on none."""
        first, *others = self._hosts.values() or [{}]
        shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
        return next(iter(self._hosts)) if len(self._hosts) == 1 else "", shared

    def unfinished(self) -> list[Result]:
        """Return a ``MISS`` for each test whose tear-down never came."""
        results = [self._result(phases, Status.MISS) for phases in (self._cut | self._phases).values()]
        self._phases.clear()
        self._cut.clear()
        return results

    def _result(self, phases: Sequence[Mapping[str, Any]], status: Status | None = None) -> Result:
        nodeid = str(phases[0]["nodeid"])
        test, host = _split_host(nodeid.partition("::")[2], self._hosts)
        properties = {
            str(key).removeprefix(_PROVENANCE): str(value)
            for phase in phases
            for key, value in phase["user_properties"]
            if str(key).startswith(_PROVENANCE)
        }
        provenance = properties or dict(self._hosts.get(host, {}))
        verdicts = [(_status(phase), phase) for phase in phases]
        bad = [(found, phase) for found, phase in verdicts if found is not Status.PASS]
        message, details = "", ""
        if status is Status.MISS:
            message = f"the run ended during the test ({phases[-1]['when']} was its last sign of life)"
        elif bad:
            # The call says more than the tear-down that then has trouble as well.
            status, phase = next((entry for entry in bad if entry[1]["when"] != "teardown"), bad[0])
            message = _failure(phase)[0]
            details = "\n".join(_failure(phase)[1] for _, phase in bad)
        return Result(
            suite=suite_of(nodeid),
            test=test,
            host=provenance.get("host", host),
            status=status or Status.PASS,
            duration_s=round(sum(float(phase["duration"]) for phase in phases), 6),
            started=float(phases[0].get("start", 0.0)),
            message=message,
            details=details,
            provenance=provenance,
        ).checked()


def suite_of(nodeid: str) -> str:
    """Return the suite of a pytest node id: the name of its file without ``test_`` and ``.py``."""
    return nodeid.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")


def _split_host(test: str, hosts: Mapping[str, object]) -> tuple[str, str]:
    """Split ``test_x[mainline-4]`` into ``test_x[4]`` and ``mainline``, if the run had a host of that name."""
    name, bracket, rest = test.partition("[")
    parameters = rest.removesuffix("]") if bracket else ""
    for host in sorted(hosts, key=len, reverse=True):
        if parameters == host:
            return name, host
        if parameters.startswith(host + "-"):
            return f"{name}[{parameters.removeprefix(host + '-')}]", host
    return test, next(iter(hosts)) if len(hosts) == 1 else ""


def _status(phase: Mapping[str, Any]) -> Status:
    outcome = phase["outcome"]
    if outcome == "passed":
        return Status.PASS
    if outcome == "skipped":
        return Status.XFAIL if "wasxfail" in phase else Status.SKIP
    if outcome != "failed":
        raise ValueError(f"unknown outcome {outcome!r}")
    kind = _exception(phase)
    if kind in _INFRASTRUCTURE:
        return Status.MISS
    return Status.ERROR if phase["when"] != "call" or kind in _MISTAKES else Status.FAIL


def _exception(phase: Mapping[str, Any]) -> str:
    """Return the name of the exception's class, empty where the report does not say."""
    match phase["longrepr"]:
        case {"reprtraceback": {"reprentries": [*_, {"data": {"reprfileloc": {"message": str(name)}}}]}}:
            return name.rpartition(".")[2]
    return ""


def _failure(phase: Mapping[str, Any]) -> tuple[str, str]:
    """Return the one line that says what happened, and everything."""
    longrepr = phase["longrepr"]
    sections = [f"--- {title} ---\n{text}" for title, text in phase.get("sections", ())]
    match longrepr:
        case [_, _, str(reason)]:
            return _one_line(reason.removeprefix("Skipped: ")), ""
        case {"reprcrash": crash, "reprtraceback": {"reprentries": entries}}:
            message = str(phase.get("wasxfail") or (crash or {}).get("message", ""))
            traceback = "\n".join(_entry(entry) for entry in entries)
            return _one_line(message), "\n".join([traceback, *sections])
        case str(text):
            last = text.strip().splitlines()[-1:] or [""]
            return _one_line(last[0].removeprefix("E ").strip()), "\n".join([text, *sections])
        case None:
            return "", "\n".join(sections)
    return "", "\n".join([str(longrepr), *sections])


def _entry(entry: Mapping[str, Any]) -> str:
    data = entry["data"]
    place = data.get("reprfileloc")
    text = "\n".join(data["lines"])
    return f"{text}\n{place['path']}:{place['lineno']}: {place['message']}" if place else text


def _one_line(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first if len(first) <= _MESSAGE_LIMIT else first[: _MESSAGE_LIMIT - 1] + "…"

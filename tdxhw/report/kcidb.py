"""KCIDB 5.3, the format in which kernel CI systems exchange results (kcidb-io has the schema).

A lost host is ``MISS`` and a missing capability ``SKIP``, so that neither looks like a kernel that got worse.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from tdxhw.report.errors import ReportError
from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status

VERSION: Final = {"major": 5, "minor": 3}
_LOG_LIMIT: Final = 16384
_ORIGIN: Final = re.compile(r"[a-z0-9_]+")
_STATUS: Final = {
    Status.PASS: "PASS",
    Status.FAIL: "FAIL",
    Status.ERROR: "ERROR",
    Status.MISS: "MISS",
    Status.SKIP: "SKIP",
    Status.XFAIL: "DONE",  # neither good nor bad: misc says what it is
}


@dataclass(frozen=True, slots=True)
class Submission:
    """What the results of one submission belong to."""

    origin: str = "tdxhw"
    checkout_id: str | None = None  # of another submission, "origin:..."; made up from the kernel release if None
    build_id: str | None = None  # of another submission; one per kernel release and GNU build id if None
    git_commit: str | None = None  # 40 hexadecimal digits, for a checkout of our own


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _path(result: Result) -> str:
    """Return ``tdxhw.hw.SUITE.TEST``; the simulator is another branch of the tree."""
    parts = ["tdxhw", "sim" if result.is_simulated else "hw", result.suite, result.test]
    return ".".join(re.sub(r"[^A-Za-z0-9_-]+", "_", part).strip("_") or "_" for part in parts)


def _excerpt(text: str) -> str:
    """Keep the end: that is where a traceback says what happened."""
    return printable(text)[-_LOG_LIMIT:]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _kernel(result: Result) -> str:
    return result.provenance.get("kernel", "unknown")


def _test(result: Result, number: int, origin: str, build_id: str) -> dict[str, Any]:
    identity = _hash(build_id, result.host, result.variant, result.name, str(result.started), str(number))
    test: dict[str, Any] = {
        "id": f"{origin}:{identity}",
        "build_id": build_id,
        "origin": origin,
        "path": _path(result),
        "status": _STATUS[result.status],
        "duration": result.duration_s,
        "environment": {
            "comment": printable(f"{result.host or 'unnamed host'}: {result.provenance.get('cpu', 'CPU unknown')}"),
            "misc": {key: printable(value) for key, value in result.provenance.items()},
        },
        "misc": {"test": printable(result.name), "variant": printable(result.variant)},
    }
    if result.started:
        test["start_time"] = _when(result.started)
    if result.message:
        test["comment"] = printable(result.message)
    if result.status is Status.XFAIL:
        test["misc"]["expected_failure"] = True
    if result.details:
        test["log_excerpt"] = _excerpt(result.details)
    return test


def document(results: Results, submission: Submission | None = None) -> dict[str, Any]:
    """Return the submission, checked against the schema. ``ReportError`` if what was given does not fit it."""
    submission = submission or Submission()
    if not _ORIGIN.fullmatch(submission.origin):
        raise ReportError(f"KCIDB origin {submission.origin!r}: lower-case letters, digits and '_' only")
    origin = submission.origin
    checkouts: dict[str, dict[str, Any]] = {}
    builds: dict[str, dict[str, Any]] = {}
    tests = []
    for number, result in enumerate(results.results):
        kernel = _kernel(result)
        build_id = submission.build_id
        if build_id is None:
            kind = "simulated" if result.is_simulated else "running"
            checkout_id = submission.checkout_id or f"{origin}:{_hash('checkout', kind, kernel)}"
            # A release may be built, and validated, many times. A kernel that was linked without is "unknown".
            linked = result.provenance.get("build_id", "unknown").removeprefix("unknown")
            build_id = f"{origin}:{_hash('build', checkout_id, kernel, *[linked] * bool(linked))}"
            if submission.checkout_id is None:
                checkouts[checkout_id] = _checkout(checkout_id, f"{kind} kernel {kernel}", submission)
            builds[build_id] = {
                "id": build_id,
                "checkout_id": checkout_id,
                "origin": origin,
                "architecture": "x86_64",
                "comment": printable(f"{kind} kernel {kernel}" + f", build id {linked}" * bool(linked)),
                "status": "PASS",  # it booted, or we would not be here
            }
            if linked:
                builds[build_id]["misc"] = {"build_id": printable(linked)}
        tests.append(_test(result, number, origin, build_id))
    parts = {"checkouts": list(checkouts.values()), "builds": list(builds.values()), "tests": tests}
    made = {"version": dict(VERSION)} | {name: part for name, part in parts.items() if part}
    _validate(made)
    return made


def _checkout(checkout_id: str, comment: str, submission: Submission) -> dict[str, Any]:
    checkout = {"id": checkout_id, "origin": submission.origin, "comment": printable(comment)}
    if submission.git_commit:
        checkout["git_commit_hash"] = submission.git_commit
    return checkout


def _validate(made: Mapping[str, Any]) -> None:
    try:
        import kcidb_io
        from jsonschema.exceptions import ValidationError
    except ImportError as error:
        raise ReportError("KCIDB results are checked with kcidb-io: pip install 'tdxhw[lab]'") from error
    try:
        kcidb_io.schema.V5_3.validate_exactly(made)
    except ValidationError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise ReportError(f"KCIDB would refuse this: {where}: {error.message.splitlines()[0]}") from error

"""One test result with its provenance: what every report and every comparison is made from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Final

SIMULATOR: Final = "sim"
_LATEST: Final = 253_402_300_799  # [s since 1970], the last second of the year 9999: the last that is a date


class Status(Enum):
    """How a test came out. A host that was lost is ``MISS``: it says nothing about the kernel."""

    PASS = "PASS"  # noqa: S105  (not a password)
    FAIL = "FAIL"  # an assertion, or a call into the kernel that was not meant to fail
    ERROR = "ERROR"  # the test itself broke: set-up, tear-down, or a mistake in its code
    MISS = "MISS"  # infrastructure: never ran to its end
    XFAIL = "XFAIL"  # failed as expected
    SKIP = "SKIP"  # the host does not offer what the test needs

    @property
    def is_bad(self) -> bool:
        """Whether somebody has to look at it as a defect of what was tested."""
        return self in (Status.FAIL, Status.ERROR)


# Worst first: what a page shows at the top, and what a group of results is called.
SEVERITY: Final = (Status.FAIL, Status.ERROR, Status.MISS, Status.PASS, Status.XFAIL, Status.SKIP)


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one test on one host."""

    suite: str
    test: str  # without the host: "test_x[4]"
    host: str  # a simulated profile, "local", or a lab host
    status: Status
    duration_s: float = 0.0  # [s]
    started: float = 0.0  # [s since 1970], 0 where unknown
    message: str = ""  # one line: what failed, why it was skipped
    details: str = ""  # traceback and captured output
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``suite::test``."""
        return f"{self.suite}::{self.test}"

    @property
    def backend(self) -> str:
        """``sim``, ``local`` or ``unknown``; whatever is not the simulator is hardware."""
        return self.provenance.get("backend", "unknown")

    @property
    def is_simulated(self) -> bool:
        """Whether the simulator produced it: then it says nothing about any hardware or kernel build."""
        return self.backend == SIMULATOR

    @property
    def variant(self) -> str:
        """What has to be equal for two results of a test to be of the same kind: profile if simulated, dialect."""
        return self.provenance.get("profile" if self.is_simulated else "dialect", "")

    def to_json(self) -> dict[str, Any]:
        """Return it as one line of the JSON-lines format."""
        return asdict(self) | {"status": self.status.value, "provenance": dict(self.provenance)}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Result":
        """Read what `to_json` wrote. ``KeyError``, ``TypeError`` or ``ValueError`` if it is anything else."""
        fields = {**line, "status": Status(line["status"]), "provenance": texts(line["provenance"])}
        return cls(**fields).checked()

    def checked(self) -> "Result":
        """Return it. ``TypeError`` or ``ValueError`` if a file has put something into it that no report can show."""
        for text in (self.suite, self.test, self.host, self.message, self.details):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not text")
        for number in (self.duration_s, self.started):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{number!r} is not a number")
            if not 0 <= number <= _LATEST:  # false for NaN, too
                raise ValueError(f"{number} is no time")
        return self


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a mapping of texts. ``AttributeError`` if it is no mapping."""
    return {str(key): str(value) for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class Results:
    """Every result of one or more runs, in the order they came."""

    results: tuple[Result, ...]
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader has to know: "a.jsonl ends in the middle of a line"

    def count(self, status: Status) -> int:
        """Return how many results have that status."""
        return sum(result.status is status for result in self.results)

    @property
    def counts(self) -> dict[str, int]:
        """The number of results by status, worst first, without the zeroes."""
        return {status.value: self.count(status) for status in SEVERITY if self.count(status)}

    @property
    def duration_s(self) -> float:
        """The time spent in tests [s]."""
        return sum(result.duration_s for result in self.results)

    def by_severity(self) -> list[Result]:
        """Return the results worst first, otherwise in their order."""
        return sorted(self.results, key=lambda result: SEVERITY.index(result.status))


def merge(parts: Iterable[Results]) -> Results:
    """Return several runs as one."""
    parts = list(parts)
    return Results(
        results=tuple(result for part in parts for result in part.results),
        sources=tuple(source for part in parts for source in part.sources),
        notes=tuple(note for part in parts for note in part.notes),
    )

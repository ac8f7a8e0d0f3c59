"""The results of one run as data: collected from pytest, printed by the console, written as JSON."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeAlias

from tdxhw import __version__
from tdxhw.host import Provenance

Outcome: TypeAlias = Literal["passed", "failed", "error", "skipped"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("passed", "failed", "error", "skipped")


@dataclass(slots=True)
class Result:
    """One test on one host."""

    suite: str
    test: str
    host: str
    outcome: Outcome
    duration_s: float
    reason: str = ""
    """Why it was skipped, or the one line that says what failed."""
    details: str = ""
    """The traceback of a failure."""
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RunRecord:
    """A whole run."""

    backend: str
    reason: str
    hosts: dict[str, Provenance]
    started: float = field(default_factory=time.time)
    duration_s: float = 0.0
    exit_code: int = 0
    interrupted: bool = False
    planned: int = 0
    results: list[Result] = field(default_factory=list)

    def count(self, outcome: Outcome, suite: str | None = None) -> int:
        """Return how many results of `suite` (of all suites without one) ended with `outcome`."""
        return sum(r.outcome == outcome and suite in (None, r.suite) for r in self.results)

    def suites(self) -> list[str]:
        """Return the suites that have results, in the order they ran."""
        return list(dict.fromkeys(result.suite for result in self.results))

    def as_json(self) -> dict[str, Any]:
        """Return the document that ``tdxhw run --json`` prints."""
        return {
            "tdxhw": __version__,
            "backend": self.backend,
            "reason": self.reason,
            "hosts": {name: dict(provenance) for name, provenance in self.hosts.items()},
            "started": self.started,
            "duration_s": round(self.duration_s, 3),
            "exit_code": self.exit_code,
            "interrupted": self.interrupted,
            "summary": {"planned": self.planned} | {outcome: self.count(outcome) for outcome in OUTCOMES},
            "results": [asdict(result) for result in self.results],
        }

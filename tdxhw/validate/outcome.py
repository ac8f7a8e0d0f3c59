"""What came of a validation: a verdict, one line, and everything behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from tdxhw.report.compare import Change
from tdxhw.report.results import Results, Status, merge
from tdxhw.validate import matrix
from tdxhw.validate.host_state import Difference
from tdxhw.validate.states import State
from tdxhw.validate.verdict import Judgement, Verdict, judge

if TYPE_CHECKING:
    from tdxhw.lab.console.findings import Finding

INTERRUPTED: Final = 130
_NAMED: Final = 3
_WORST_FIRST: Final = (Verdict.REGRESSED, Verdict.INCONCLUSIVE, Verdict.GOOD)


@dataclass(slots=True)
class Tried:
    """One boot of the candidate with its module parameters, and what was found out under it."""

    parameters: dict[str, str]
    results: list[Results] = field(default_factory=list)
    findings: "list[Finding]" = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_as_asked: list[str] = field(default_factory=list)  # parameters that have other values than were asked for
    left_behind: list[str] = field(default_factory=list)  # by the suites, of what only the kernel can give back
    boot_failure: str = ""
    other_parameters: bool = False  # one of them is not what it is under the host's own kernel

    def told_apart(self) -> Results:
        """Return the results with the parameters of this boot: with others, the same test may well fail."""
        whole = merge(self.results)
        if not self.parameters:
            return whole
        told = {"parameters": matrix.words(self.parameters)}
        marked = (replace(one, provenance={**one.provenance, **told}) for one in whole.results)
        return replace(whole, results=tuple(marked))


@dataclass(slots=True)
class Outcome:
    """A finished validation, however it ended."""

    host: str
    release: str
    base: Results
    narrowed: bool = False  # not every test of it was to be run
    tries: int = 1  # how often a test has to fail, if nothing cuts the tries short
    build_id: str = ""  # a release may be built many times
    base_findings: "list[Finding]" = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of infrastructure, of the whole
    differences: list[Difference] = field(default_factory=list)  # of the host, before and after
    state: State = State.BASE  # in which it was left
    interrupted: bool = False
    duration_s: float = 0.0

    @property
    def judgements(self) -> list[tuple[Tried, Judgement]]:
        """The verdict on each boot; what went wrong with the whole counts for every one."""
        problems = list(self.problems) + ["interrupted"] * self.interrupted
        tried = self.tried or [Tried({})]
        return [
            (
                one,
                judge(
                    self.base, merge(one.results), problems=[*one.problems, *problems],
                    findings=[] if one.boot_failure else one.findings,  # what it died of is told already
                    base_findings=self.base_findings, boot_failure=one.boot_failure,
                    other_parameters=one.other_parameters, not_as_asked=one.not_as_asked,
                    tries=self.tries if one.problems else 1, left_behind=one.left_behind, narrowed=self.narrowed,
                ),
            )
            for one in tried
        ]  # fmt: skip

    @property
    def verdict(self) -> Verdict:
        """The worst of all boots."""
        return min((judgement.verdict for _, judgement in self.judgements), key=_WORST_FIRST.index)

    @property
    def exit_code(self) -> int:
        """As `git bisect run` understands it; 130, on which it stops, after Ctrl-C."""
        return INTERRUPTED if self.interrupted else self.verdict.value

    @property
    def results(self) -> Results:
        """The results of all boots."""
        return merge(one.told_apart() for one in self.tried)

    @property
    def line(self) -> str:
        """``GOOD linux 7.2.13-good on vm: 131 passed, 0 regressions, 2 flaky (suite::a, suite::b)``."""
        head = f"{self.verdict.name} linux {self.release} on {self.host}"
        if self.verdict is Verdict.GOOD:
            return f"{head}: {self._counts()}"
        bad = [(one, judgement) for one, judgement in self.judgements if judgement.verdict is self.verdict]
        one, judgement = bad[0]
        with_parameters = f" with {matrix.words(one.parameters)}" if one.parameters else ""
        more = f" (and {len(bad) - 1} more of {len(self.tried)} boots)" if len(bad) > 1 else ""
        return f"{head}{with_parameters}: {judgement.line.partition(': ')[2]}{more}"

    def _counts(self) -> str:
        results = self.results
        judgements = [judgement for _, judgement in self.judgements]
        regressions = sum(len(j.comparison.of(Change.REGRESSION)) for j in judgements if j.comparison is not None)
        flaky = sorted({name for judgement in judgements for name in judgement.flaky})
        names = f" ({_some(flaky)})" if flaky else ""
        return f"{results.count(Status.PASS)} passed, {regressions} regressions, {len(flaky)} flaky{names}"

    def as_json(self) -> dict[str, Any]:
        """Return the document that ``tdxhw validate --json`` prints."""
        return {
            "verdict": self.verdict.name,
            "exit_code": self.exit_code,
            "line": self.line,
            "host": self.host,
            "kernel": self.release,
            "build_id": self.build_id,
            "interrupted": self.interrupted,
            "duration_s": round(self.duration_s, 1),
            "host_state": self.state.name,
            "problems": list(self.problems),
            "differences": [
                {"what": one.what, "before": one.before, "after": one.after, "restored": not one.is_ours}
                for one in self.differences
            ],
            "boots": [
                {
                    "parameters": one.parameters,
                    "verdict": judgement.verdict.name,
                    "reasons": list(judgement.reasons),
                    "flaky": list(judgement.flaky),
                    "boot_failure": one.boot_failure,
                    "findings": [
                        {
                            "kind": finding.kind, "at": finding.at, "text": finding.text, "decoded": finding.decoded,
                            "test": finding.test, "lines": list(finding.lines),
                        }
                        for finding in one.findings
                    ],
                    "results": [result.to_json() for results in one.results for result in results.results],
                }
                for one, judgement in self.judgements
            ],
        }  # fmt: skip


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])

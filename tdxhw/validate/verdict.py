"""Is this kernel build good? The answer from two sets of results, from the console, and from what went wrong.

Proof outranks doubt, and doubt outranks silence: one test that passed and now fails on every try, or one new oops,
is a regression whatever else happened; infrastructure that failed never is one, and without it nothing is called good.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from tdxhw.lab.went_down import TOOK_THE_HOST_DOWN
from tdxhw.report.compare import Change, Comparison, Entry, compare
from tdxhw.report.results import Results, Status

if TYPE_CHECKING:
    from tdxhw.lab.console.findings import Finding

_NAMED: Final = 3  # tests and findings that the one line names; `reasons` has all


class Verdict(Enum):
    """What `tdxhw validate` says; the value is its exit code, which `git bisect run` understands."""

    GOOD = 0
    REGRESSED = 1
    INCONCLUSIVE = 125


class Weight(Enum):
    """What one observation does to the verdict, the weightiest first."""

    REGRESSES = "regressed"
    UNCLEAR = "inconclusive"
    NOTE = "note"
    NOTHING = "nothing"


# The whole policy, in two tables. A change of a test:
CHANGE_WEIGHTS: Final[Mapping[Change, Weight]] = {
    Change.REGRESSION: Weight.REGRESSES,
    Change.NEW_FAILURE: Weight.UNCLEAR,  # the baseline says nothing about it
    Change.LOST: Weight.UNCLEAR,  # passed in the baseline, else a note
    Change.GONE: Weight.UNCLEAR,  # the same
    Change.FLAKY: Weight.NOTE,
    Change.STILL_FAILING: Weight.NOTE,
    Change.FIX: Weight.NOTE,
    Change.NEW: Weight.NOTE,
    Change.UNCHANGED: Weight.NOTHING,
}

# A finding on the console that the baseline does not have:
FINDING_WEIGHTS: Final[Mapping[str, Weight]] = {
    "panic": Weight.REGRESSES,
    "oops": Weight.REGRESSES,
    "warning": Weight.REGRESSES,
    "lockdep": Weight.REGRESSES,
    "kasan": Weight.REGRESSES,
    "ubsan": Weight.REGRESSES,
    "kcsan": Weight.REGRESSES,
    "kmsan": Weight.REGRESSES,
    "kfence": Weight.REGRESSES,
    "bug": Weight.REGRESSES,
    "hung-task": Weight.REGRESSES,
    "rcu-stall": Weight.REGRESSES,
    "soft-lockup": Weight.REGRESSES,
    "hard-lockup": Weight.REGRESSES,
    "machine-check": Weight.UNCLEAR,  # hardware that breaks, or a kernel that misuses private memory
    "seamcall": Weight.NOTE,  # tests provoke some on purpose; it explains a regression, it is none
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict, in one line and in full."""

    verdict: Verdict
    line: str  # "REGRESSED: 2 tests fail that passed: …"
    reasons: tuple[str, ...]  # one line each, the weightiest first; notes at the end
    comparison: Comparison | None  # None: the two could not be compared
    flaky: tuple[str, ...]  # tests that passed and failed under the same conditions


@dataclass(frozen=True, slots=True)
class _Observation:
    weight: Weight
    kind: str  # what it is counted as in the one line
    reason: str  # as it stands in `reasons`
    name: str  # as the one line names it


def judge(
    base: Results,
    new: Results,
    *,
    problems: Sequence[str] = (),
    findings: Sequence["Finding"] = (),
    base_findings: Sequence["Finding"] = (),
    boot_failure: str = "",
    other_parameters: bool = False,
    not_as_asked: Sequence[str] = (),
    left_behind: Sequence[str] = (),
    narrowed: bool = False,
    tries: int = 1,
) -> Judgement:
    """Say whether NEW is as good as BASE.

    `problems` are failures of infrastructure, one line each. `findings` were on the console of the new kernel;
    what is in `base_findings`, too, is nothing new. `boot_failure` says how the new kernel was proven not to boot.
    With `other_parameters` the new kernel was asked to be another than the baseline's (``kvm_intel.tdx=N``): a test
    that is now skipped is then a note, as long as others say something. `not_as_asked` are parameters that did not take
    effect, one line each: what was tried is then not what was to be tried. `left_behind` is what the suites
    did not give back (the baseline does not know whether its kernel did). `narrowed` says that not every test of the
    baseline was to be run (``-k``): those that did not are then no loss. A failure with fewer than `tries` tries
    proves nothing (infrastructure cut them short), unless the host went down under it. Only results from hardware
    count: the simulator says nothing about a kernel build.
    """
    base, new = _hardware(base), _hardware(new)
    seen = [_unclear("infrastructure", f"infrastructure: {problem}", problem) for problem in problems]
    seen += [_unclear("parameters", f"parameters: {line}", line) for line in not_as_asked]
    seen += [_unclear("left behind", f"left behind by the suites: {line}", line) for line in left_behind]
    if boot_failure:
        # It ran no test, so there is nothing to compare, and nothing more to prove.
        seen.append(_Observation(Weight.REGRESSES, "boot", f"boot: {boot_failure}", boot_failure))
    comparison, obstacle = _compared(base, new)
    if obstacle and not (boot_failure and not new.results):
        seen.append(_unclear("not comparable", obstacle, obstacle))
    if comparison is not None:
        seen += _of_tests(comparison, findings, other_parameters=other_parameters, narrowed=narrowed, tries=tries)
    seen += _of_console(findings, base_findings)
    return _concluded(comparison, seen)


def why_useless(base: Results) -> str:
    """Say in one line why nothing could ever be concluded from a baseline; nothing if something can."""
    kept = _hardware(base).results
    if not kept:
        return "has no result from hardware" + " (the simulator says nothing about a kernel build)" * bool(base.results)
    return "" if any(one.status is Status.PASS for one in kept) else "has no test that passed on hardware"


def _hardware(results: Results) -> Results:
    kept = tuple(result for result in results.results if not result.is_simulated)
    left_out = len(results.results) - len(kept)
    note = (f"{left_out} results of the simulator are left out: they say nothing about a kernel build",)
    return Results(kept, results.sources, results.notes + note * bool(left_out))


def _compared(base: Results, new: Results) -> tuple[Comparison | None, str]:
    """Return the comparison, and why nothing can be concluded from it, if so."""
    for side, results in (("the baseline", base), ("the run of the new kernel", new)):
        if not results.results:
            return None, f"{side} has no result from hardware"
    comparison = compare(base, new)
    if not any(entry.base and entry.new for entry in comparison.entries):
        variants = [sorted({result.variant or "-" for result in side.results}) for side in (base, new)]
        if variants[0] != variants[1]:
            return comparison, f"no test in common: dialect {'/'.join(variants[0])} → {'/'.join(variants[1])}"
        return comparison, "the baseline and the run of the new kernel have no test in common"
    if not any(_passed(entry) and any(_says_something(r.status) for r in entry.new) for entry in comparison.entries):
        return comparison, "no test that passed in the baseline has passed or failed now"
    return comparison, ""


def _passed(entry: Entry) -> bool:
    return any(result.status is Status.PASS for result in entry.base)


def _says_something(status: Status) -> bool:
    return status is Status.PASS or status.is_bad


def _unclear(kind: str, reason: str, name: str) -> _Observation:
    return _Observation(Weight.UNCLEAR, kind, reason, name)


# ---- tests ----


def _of_tests(
    comparison: Comparison, findings: Iterable["Finding"], *, other_parameters: bool, narrowed: bool, tries: int
) -> list[_Observation]:
    console: dict[str, list[str]] = {}
    for finding in findings:
        console.setdefault(finding.test, []).append(_told(finding))
    seen = []
    for entry in comparison.entries:
        weight = CHANGE_WEIGHTS[entry.change]
        if entry.change in (Change.LOST, Change.GONE) and not _passed(entry):
            weight = Weight.NOTE  # it never passed: nothing that was known is lost
        if other_parameters and entry.change is Change.LOST and all(r.status is Status.SKIP for r in entry.new):
            weight = Weight.NOTE  # it was asked for
        cut_short = entry.change is Change.REGRESSION and not _is_proven(entry, tries)
        if cut_short:
            weight = Weight.UNCLEAR
        if narrowed and entry.change is Change.GONE:
            continue  # the same
        if weight is Weight.NOTHING:
            continue
        told = _message(entry)
        if weight is Weight.REGRESSES and entry.name in console:
            told = "; ".join([*filter(None, [told]), "console: " + ", ".join(sorted(console[entry.name]))])
        if cut_short:
            told = "; ".join([*filter(None, [told]), "not tried again"])
        where = f" [{entry.host}]" if entry.host else ""
        reason = f"{entry.change.value}: {entry.name}{where}{f': {told}' if told else ''}"
        seen.append(_Observation(weight, entry.change.value, reason, f"{entry.name}{f' ({told})' if told else ''}"))
    for key, (before, after) in comparison.conditions.items():
        if key != "kernel":
            changed = f"also changed: {key} {', '.join(before) or '-'} → {', '.join(after) or '-'}"
            seen.append(_Observation(Weight.NOTE, "", changed, changed))
    notes = list(comparison.notes)
    if narrowed and (gone := len(comparison.of(Change.GONE))):
        notes.append(f"{gone} tests of the baseline did not run: they were not asked for")
    old = {result.host for entry in comparison.entries for result in entry.base}
    new = {result.host for entry in comparison.entries for result in entry.new}
    if old and new and not old & new:
        notes.append(f"the baseline is of another host: {', '.join(sorted(old))}")
    seen += [_Observation(Weight.NOTE, "", note, note) for note in notes]
    return seen


def _is_proven(entry: Entry, tries: int) -> bool:
    """Whether a test failed as often as was planned, or took its host down."""
    bad = [result for result in entry.new if result.status.is_bad]
    return len(bad) >= tries or any(result.message in TOOK_THE_HOST_DOWN for result in bad)


def _message(entry: Entry) -> str:
    """Return what the test said, the same whatever the order of its tries."""
    said = sorted({r.message for r in entry.new if r.message and r.status is not Status.PASS})
    return said[0] if said else ""


# ---- console ----


def _of_console(findings: Sequence["Finding"], base_findings: Iterable["Finding"]) -> list[_Observation]:
    known = {_signature(finding) for finding in base_findings}
    seen: dict[tuple[str, str], _Observation] = {}
    for finding in findings:
        signature = _signature(finding)
        if signature in seen:
            continue
        told = _told(finding)
        during = f" (during {finding.test})" if finding.test else ""
        weight = FINDING_WEIGHTS.get(finding.kind, Weight.UNCLEAR)
        if signature in known:
            weight, during = Weight.NOTE, f"{during}, as in the baseline"
        seen[signature] = _Observation(weight, "console", f"console: {told}{during}", told)
    return list(seen.values())


def _told(finding: "Finding") -> str:
    text = f"{finding.kind}: {finding.text}"
    return f"{text} ({finding.decoded})" if finding.decoded else text


_VARIES: Final = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b|\b[0-9]+\b")


def _signature(finding: "Finding") -> tuple[str, str]:
    """Return what makes two findings the same: addresses, PIDs, CPUs and times left out."""
    if finding.kind == "seamcall":
        return finding.kind, finding.text  # here the number is the finding
    return finding.kind, _VARIES.sub("#", finding.text)


# ---- conclusion ----

_LINES: Final = {
    # what the one line says of observations of a kind: of one, of several
    "boot": ("the kernel does not boot", "the kernel does not boot"),
    Change.REGRESSION.value: ("1 test fails that passed", "{} tests fail that passed"),
    "console": ("1 new finding on the console", "{} new findings on the console"),
    "infrastructure": ("infrastructure", "infrastructure, {} problems"),
    "parameters": ("not with the parameters that were asked for", "not with the parameters that were asked for"),
    "left behind": ("left behind by the suites", "left behind by the suites"),
    "not comparable": ("nothing to compare", "nothing to compare"),
    Change.LOST.value: ("1 test that passed did not run", "{} tests that passed did not run"),
    Change.GONE.value: ("1 test that passed is gone", "{} tests that passed are gone"),
    Change.NEW_FAILURE.value: ("1 test fails that the baseline did not run", "{} fail that the baseline did not run"),
}


def _concluded(comparison: Comparison | None, seen: Iterable[_Observation]) -> Judgement:
    order, kinds = list(Weight), [*_LINES, *(change.value for change in Change), ""]
    seen = sorted(seen, key=lambda one: (order.index(one.weight), kinds.index(one.kind), one.reason))
    weightiest = seen[0].weight if seen else Weight.NOTHING
    verdict = {Weight.REGRESSES: Verdict.REGRESSED, Weight.UNCLEAR: Verdict.INCONCLUSIVE}.get(weightiest, Verdict.GOOD)
    decisive = [one for one in seen if one.weight is weightiest]
    text = _good(comparison) if verdict is Verdict.GOOD else _summed_up(decisive)
    flaky = {entry.name for entry in comparison.of(Change.FLAKY)} if comparison else set()
    reasons = tuple(dict.fromkeys(one.reason for one in seen))
    return Judgement(verdict, f"{verdict.name}: {text}", reasons, comparison, tuple(sorted(flaky)))


def _summed_up(decisive: Sequence[_Observation]) -> str:
    parts = []
    for kind in dict.fromkeys(one.kind for one in decisive):
        names = list(dict.fromkeys(one.name for one in decisive if one.kind == kind))
        one, several = _LINES[kind]
        more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
        count = one if len(names) == 1 else several.format(len(names))
        parts.append(f"{count}: {'; '.join([*names[:_NAMED], *more])}")
    return " · ".join(parts)


def _good(comparison: Comparison | None) -> str:
    assert comparison is not None, "nothing is good without a comparison"
    passing = sum(_passed(entry) and entry.change is Change.UNCHANGED for entry in comparison.entries)
    parts = [f"{passing} {'test passes' if passing == 1 else 'tests pass'} as before"]
    for change, word in ((Change.FIX, "fixed"), (Change.FLAKY, "flaky"), (Change.STILL_FAILING, "failing as before")):
        if count := len(comparison.of(change)):
            parts.append(f"{count} {word}")
    return ", ".join(parts)

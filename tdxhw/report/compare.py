"""Compare two sets of results. Only like with like: the same test, dialect or profile, backend and, if shared, host.

A retry that passes makes a test flaky, not good; hosts that disagree are no regression; what infrastructure lost
is neither. Those are the rules that keep a verdict believable.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any, Final

from tdxhw.report.errors import ReportError
from tdxhw.report.results import Result, Results, Status

# What makes two runs differ besides the kernel that is on trial.
_CONDITIONS: Final = ("kernel", "build_id", "tdx_module", "cpu", "microcode", "dialect", "profile", "tdxhw")
_SLOWER_FACTOR: Final = 2.0
_SLOWER_FLOOR_S: Final = 0.5


class Change(Enum):
    """What became of a test, the most important first."""

    REGRESSION = "regression"  # passed, and now always fails
    NEW_FAILURE = "new, failing"
    FLAKY = "flaky"  # passes and fails under the same conditions, now
    LOST = "no longer run"  # passed, and is now skipped or was lost by infrastructure
    GONE = "gone"
    STILL_FAILING = "still failing"
    FIX = "fixed"
    NEW = "new"
    UNCHANGED = "unchanged"


class _State(Enum):
    ABSENT = "absent"
    PASS = "pass"  # noqa: S105  (not a password)
    BAD = "fail"
    MIXED = "pass and fail"
    IDLE = "not run"  # skipped, expected failure, lost


# The whole policy: what a test's state in BASE and in NEW means.
# fmt: off
CHANGES: Final[Mapping[tuple[_State, _State], Change]] = {
    # BASE            NEW
    (_State.PASS,    _State.BAD):    Change.REGRESSION,
    (_State.IDLE,    _State.BAD):    Change.NEW_FAILURE,
    (_State.ABSENT,  _State.BAD):    Change.NEW_FAILURE,
    (_State.PASS,    _State.MIXED):  Change.FLAKY,
    (_State.BAD,     _State.MIXED):  Change.FLAKY,
    (_State.MIXED,   _State.MIXED):  Change.FLAKY,
    (_State.IDLE,    _State.MIXED):  Change.FLAKY,
    (_State.ABSENT,  _State.MIXED):  Change.FLAKY,
    (_State.MIXED,   _State.BAD):    Change.FLAKY,          # it failed before, too: no proof of a regression
    (_State.PASS,    _State.IDLE):   Change.LOST,
    (_State.MIXED,   _State.IDLE):   Change.LOST,
    (_State.PASS,    _State.ABSENT): Change.GONE,
    (_State.BAD,     _State.ABSENT): Change.GONE,
    (_State.MIXED,   _State.ABSENT): Change.GONE,
    (_State.IDLE,    _State.ABSENT): Change.GONE,
    (_State.BAD,     _State.BAD):    Change.STILL_FAILING,
    (_State.BAD,     _State.IDLE):   Change.LOST,
    (_State.BAD,     _State.PASS):   Change.FIX,
    (_State.MIXED,   _State.PASS):   Change.UNCHANGED,      # one good run does not prove that a flake is gone
    (_State.ABSENT,  _State.PASS):   Change.NEW,
    (_State.ABSENT,  _State.IDLE):   Change.NEW,
    (_State.IDLE,    _State.PASS):   Change.NEW,
    (_State.IDLE,    _State.IDLE):   Change.UNCHANGED,
    (_State.PASS,    _State.PASS):   Change.UNCHANGED,
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Entry:
    """One test of one kind, in BASE and in NEW."""

    name: str
    variant: str  # dialect on hardware, profile on the simulator
    host: str  # the host, where both sides ran on it; else empty
    change: Change
    base: tuple[Result, ...]
    new: tuple[Result, ...]

    @property
    def message(self) -> str:
        """Why it is what it is now, in one line."""
        told = [result.message for result in self.new if result.message and result.status is not Status.PASS]
        return told[0] if told else ""

    @property
    def slowdown(self) -> float | None:
        """How many times longer it takes now, if that is worth a word."""
        times = [
            [result.duration_s for result in side if result.status is Status.PASS] for side in (self.base, self.new)
        ]
        if not all(times):
            return None
        base_s, new_s = median(times[0]), median(times[1])
        if new_s - base_s < _SLOWER_FLOOR_S or base_s <= 0 or new_s / base_s < _SLOWER_FACTOR:
            return None
        return new_s / base_s

    def to_json(self) -> dict[str, Any]:
        """Return it as ``tdxhw compare --json`` prints it."""
        return {
            "test": self.name,
            "variant": self.variant,
            "host": self.host,
            "change": self.change.value,
            "base": [result.status.value for result in self.base],
            "new": [result.status.value for result in self.new],
            "message": self.message,
            "slowdown": self.slowdown,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that changed, and under which conditions it was compared."""

    entries: tuple[Entry, ...]
    conditions: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # what differs: values in BASE, in NEW
    notes: tuple[str, ...]

    def of(self, change: Change) -> list[Entry]:
        """Return the entries of one kind."""
        return [entry for entry in self.entries if entry.change is change]

    @property
    def counts(self) -> dict[str, int]:
        """The number of entries by kind, the most important first, without the zeroes."""
        counted = Counter(entry.change for entry in self.entries)
        return {change.value: counted[change] for change in Change if counted[change]}

    @property
    def has_regressed(self) -> bool:
        """Whether one test is worse for certain."""
        return any(entry.change is Change.REGRESSION for entry in self.entries)


def _state(results: Sequence[Result]) -> _State:
    statuses = {result.status for result in results}
    bad = any(status.is_bad for status in statuses)
    if Status.PASS in statuses:
        return _State.MIXED if bad else _State.PASS
    if bad:
        return _State.BAD
    return _State.IDLE if statuses else _State.ABSENT


_Key = tuple[str, str, str]  # name, variant, backend


def _by_key(results: Iterable[Result], *, across_backends: bool) -> dict[_Key, list[Result]]:
    grouped: defaultdict[_Key, list[Result]] = defaultdict(list)
    for result in results:
        variant = result.provenance.get("dialect", "") if across_backends else result.variant
        kind = "" if across_backends else "simulator" if result.is_simulated else "hardware"
        grouped[result.name, variant, kind].append(result)
    return grouped


def _entries(name: str, variant: str, base: Sequence[Result], new: Sequence[Result]) -> Iterable[Entry]:
    """Yield one entry per host that both sides ran on; if there is none, one over all hosts."""
    shared = {result.host for result in base} & {result.host for result in new}
    for host in sorted(shared) if shared else [""]:
        before, after = (tuple(r for r in side if not shared or r.host == host) for side in (base, new))
        yield Entry(name, variant, host, CHANGES[_state(before), _state(after)], before, after)


def compare(base: Results, new: Results, *, across_backends: bool = False) -> Comparison:
    """Compare two sets of results.

    Simulator and hardware are only compared with each other if `across_backends` says so; two sides without
    a backend in common are a ``ReportError``.
    """
    for results, side in ((base, "BASE"), (new, "NEW")):
        if not results.results:
            raise ReportError(f"{side} ({', '.join(results.sources)}) has no result to compare")
    kinds = [{"simulator" if r.is_simulated else "hardware" for r in side.results} for side in (base, new)]
    notes = [*base.notes, *new.notes]
    if across_backends and kinds[0] != kinds[1]:
        notes.append(f"BASE is {' and '.join(sorted(kinds[0]))}, NEW is {' and '.join(sorted(kinds[1]))}")
    elif not kinds[0] & kinds[1]:
        raise ReportError(
            f"BASE is all {kinds[0].pop()} and NEW is all {kinds[1].pop()}: a pass of one says nothing about the "
            "other; --across-backends compares them all the same"
        )
    olds, news = (_by_key(side.results, across_backends=across_backends) for side in (base, new))
    if not across_backends:
        for kind in sorted(kinds[0] ^ kinds[1]):
            side = "BASE" if kind in kinds[0] else "NEW"
            notes.append(f"only {side} has results from {kind}: not compared")
        both = kinds[0] & kinds[1]
        olds, news = ({key: value for key, value in side.items() if key[2] in both} for side in (olds, news))
    entries = [
        entry
        for key in dict.fromkeys([*olds, *news])
        for entry in _entries(key[0], key[1], olds.get(key, ()), news.get(key, ()))
    ]
    before = [result for entry in entries for result in entry.base]
    after = [result for entry in entries for result in entry.new]
    left_out = sum(map(len, [*olds.values(), *news.values()])) - len(before) - len(after)
    if left_out:
        notes.append(f"{left_out} results are from hosts that only one side has: not compared")
    order = list(Change)
    entries.sort(key=lambda entry: (order.index(entry.change), entry.name, entry.variant, entry.host))
    return Comparison(tuple(entries), _conditions(before, after), tuple(notes))


def _conditions(base: Sequence[Result], new: Sequence[Result]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    differing = {}
    for key in _CONDITIONS:
        sides = tuple(tuple(sorted({r.provenance[key] for r in side if key in r.provenance})) for side in (base, new))
        if sides[0] != sides[1] and not (key == "build_id" and "kernel" in differing):  # said already
            differing[key] = (sides[0], sides[1])
    return differing

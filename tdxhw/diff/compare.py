"""Compare two recordings call by call: test by test, and within a test thread by thread."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from tdxhw.diff.recording import Recording, TestCalls
from tdxhw.diff.rules import RULES, Rule, RuleSet

Call: TypeAlias = Mapping[str, Any]

_ANSWER: Final = ("ret", "errno", "hw_error", "limit", "exit")
_INDEX: Final = re.compile(r"\[[^\]]*\]")
MISSING: Final = "(no call)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One call that the sides answer differently, or one test that ends differently."""

    kind: str
    """Same request, same fields, same errnos: the same kind."""
    test: str
    position: int
    """Which call of the test, from 0; -1 for the test's outcome."""
    first: Call
    second: Call
    fields: tuple[tuple[str, Any, Any], ...]
    """Path, value on the first side, value on the second."""


@dataclass(slots=True)
class Comparison:
    """What comparing came to."""

    first: Recording
    second: Recording
    same_equipment: bool
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Tests that exist or ran on one side only, each with the reason."""
    failed_on_both: list[str] = field(default_factory=list)
    uncompared_calls: int = 0
    """Calls after a test's sides went different ways, or of tests that only one side ran."""
    not_compared: Mapping[str, int] = field(default_factory=dict)
    """Values under a rule, by its reason."""

    def kinds(self) -> dict[str, list[Difference]]:
        """Return the differences by kind, in the order in which each first appeared."""
        by_kind: dict[str, list[Difference]] = {}
        for difference in self.differences:
            by_kind.setdefault(difference.kind, []).append(difference)
        return by_kind


def compare(first: Recording, second: Recording, rules: tuple[Rule, ...] = RULES) -> Comparison:
    """Compare every test that ran on both sides."""
    same_equipment = first.like_other_side or second.like_other_side
    rule_set = RuleSet(same_equipment=same_equipment, rules=rules)
    result = Comparison(first, second, same_equipment)
    for name in dict.fromkeys([*first.tests, *second.tests]):
        one, other = first.tests.get(name), second.tests.get(name)
        if one is None or other is None:
            _one_side_only(result, name, one, other)
        elif "skipped" in (one.outcome, other.outcome):
            if one.outcome != other.outcome:
                _one_side_only(result, name, one, other)
        else:
            _compare_test(result, rule_set, one, other)
    result.not_compared = rule_set.skipped
    return result


def _one_side_only(result: Comparison, name: str, one: TestCalls | None, other: TestCalls | None) -> None:
    if one is None or other is None:
        there, label = (other, result.first.label) if one is None else (one, result.second.label)
        why = f"{label} does not have it"
    else:
        skipped_first = one.outcome == "skipped"
        there = other if skipped_first else one
        label = (result.first if skipped_first else result.second).label
        why = f"skipped on {label}: {(one if skipped_first else other).reason}"
    assert there is not None
    result.uncompared_calls += len(there.calls)
    result.left_out.append(f"{name}: {why}")


def _compare_test(result: Comparison, rules: RuleSet, one: TestCalls, other: TestCalls) -> None:
    found = len(result.differences)
    threads = dict.fromkeys(call.get("thread", "") for call in (*one.calls, *other.calls))
    for thread in threads:
        _compare_calls(result, rules, one, other, thread)
    failed = [test.outcome != "passed" for test in (one, other)]
    if all(failed):
        result.failed_on_both.append(f"{one.name}: {one.reason}")
    elif any(failed) and len(result.differences) == found:
        # Every call was answered alike, and yet one side failed: what differs is in guest memory, or took too long.
        answers = [{"outcome": test.outcome, "reason": test.reason} for test in (one, other)]
        fields = tuple((key, answers[0][key], answers[1][key]) for key in ("outcome", "reason"))
        result.differences.append(Difference("the test's outcome", one.name, -1, answers[0], answers[1], fields))


def _compare_calls(result: Comparison, rules: RuleSet, one: TestCalls, other: TestCalls, thread: str) -> None:
    """Compare the calls of one thread until the sides go different ways."""
    ours = [call for call in one.calls if call.get("thread", "") == thread]
    theirs = [call for call in other.calls if call.get("thread", "") == thread]
    for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if (a["req"], a.get("obj")) != (b["req"], b.get("obj")):
            _went_apart(result, one.name, position, a, b)
            result.uncompared_calls += len(ours) + len(theirs) - 2 * position - 2
            return
        result.compared += 1
        if fields := _compare_call(rules, a, b):
            result.differences.append(Difference(_kind(a, b, fields), one.name, position, a, b, fields))
    if len(ours) != len(theirs):
        position = min(len(ours), len(theirs))
        a = ours[position] if position < len(ours) else {"req": MISSING}
        b = theirs[position] if position < len(theirs) else {"req": MISSING}
        _went_apart(result, one.name, position, a, b)
        result.uncompared_calls += abs(len(ours) - len(theirs)) - 1


def _went_apart(result: Comparison, name: str, position: int, a: Call, b: Call) -> None:
    fields = (("call", f"{a.get('obj', '')} {a['req']}".strip(), f"{b.get('obj', '')} {b['req']}".strip()),)
    result.compared += 1
    result.differences.append(
        Difference(f"{a['req']} where the other side calls {b['req']}", name, position, a, b, fields)
    )


def _compare_call(rules: RuleSet, a: Call, b: Call) -> tuple[tuple[str, Any, Any], ...]:
    """Return every field that differs and that no rule keeps from being compared."""
    applying = rules.applying(a) or rules.applying(b)
    found = []
    for path, ours, theirs in _pairs(a, b):
        if applying and rules.skips(applying, path):
            continue
        if ours != theirs:
            found.append((path, ours, theirs))
    return tuple(found)


def _pairs(a: Call, b: Call) -> list[tuple[str, Any, Any]]:
    pairs = [(key, a.get(key), b.get(key)) for key in _ANSWER if key in a or key in b]
    for prefix, key in (("arg", "arg"), ("", "out")):
        ours, theirs = a.get(key, {}), b.get(key, {})
        if isinstance(ours, dict) and isinstance(theirs, dict):
            start = f"{prefix}." if prefix else ""
            # A field that is not listed is zero in an argument, and unchanged in an answer.
            pairs += [
                (start + path, ours.get(path, 0), theirs.get(path, 0)) for path in dict.fromkeys([*ours, *theirs])
            ]
        else:
            pairs.append((prefix or "out", ours, theirs))
    return pairs


def _kind(a: Call, b: Call, fields: tuple[tuple[str, Any, Any], ...]) -> str:
    paths = ", ".join(dict.fromkeys(_INDEX.sub("[]", path) for path, _, _ in fields))
    return f"{a['req']} {a.get('errno', 'ok')}/{b.get('errno', 'ok')} {a.get('exit', '')}/{b.get('exit', '')}: {paths}"

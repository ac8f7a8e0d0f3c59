"""Show a comparison: side by side for people, one document for programs."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tdxhw.diff.compare import Comparison, Difference
from tdxhw.diff.recording import Recording
from uapi_ctypes.caps import KvmCap

_MOST_FIELDS: Final = 12
"""Fields shown of one difference; the rest is in --json."""
_DECIMAL_BELOW: Final = 1 << 12
_WIDTH: Final = 36
"""Of a value in a column [characters]; longer ones are cut in the table and whole in --json."""
_CHECK_EXTENSION: Final = "KVM_CHECK_EXTENSION"


def lines(result: Comparison) -> Iterator[str]:
    """Yield the report for people; its last line says how many calls were compared and how many differ."""
    for name, side in (("A", result.first), ("B", result.second)):
        yield f"{name}  {_side(side)}"
        for key, value in side.provenance.items():
            yield f"     {key} {value}"
    yield ""
    for kind, found in result.kinds().items():
        yield from _difference(kind, found)
    for title, notes in (("not compared", result.left_out), ("failed on both sides", result.failed_on_both)):
        if notes:
            yield f"{title}: {len(notes)} tests"
            yield from (f"  {note}" for note in notes)
    if result.uncompared_calls:
        yield f"{result.uncompared_calls} calls have no counterpart and were not compared"
    if result.not_compared:
        yield f"{sum(result.not_compared.values())} values were not compared:"
        for reason, count in sorted(result.not_compared.items(), key=lambda item: -item[1]):
            yield f"  {count:>6}  {reason}"
    yield summary(result)


def summary(result: Comparison) -> str:
    """Return the line on which everything ends."""
    return f"{result.compared} calls compared, {len(result.differences)} differences"


def document(result: Comparison) -> dict[str, Any]:
    """Return everything as one JSON document."""
    return {
        "sides": [
            {"label": side.label, "recorded": side.recorded, "provenance": dict(side.provenance)}
            for side in (result.first, result.second)
        ],
        "same_equipment": result.same_equipment,
        "compared": result.compared,
        "differences": len(result.differences),
        "kinds": [
            {"kind": kind, "count": len(found), "first": _as_json(found[0])} for kind, found in result.kinds().items()
        ],
        "one_side_only": result.left_out,
        "failed_on_both": result.failed_on_both,
        "uncompared_calls": result.uncompared_calls,
        "values_not_compared": dict(result.not_compared),
    }


def _as_json(difference: Difference) -> dict[str, Any]:
    return {
        "test": difference.test,
        "position": difference.position,
        "fields": [{"path": path, "a": ours, "b": theirs} for path, ours, theirs in difference.fields],
        "a": dict(difference.first),
        "b": dict(difference.second),
    }


def _side(side: Recording) -> str:
    if side.recorded:
        return f"{side.label} (recorded {side.recorded})"
    return f"{side.label} (its equipment taken from the other side)" if side.like_other_side else side.label


def _difference(kind: str, found: list[Difference]) -> Iterator[str]:
    first = found[0]
    where = f", call {first.position}" if first.position >= 0 else ""
    yield f"{first.test}{where}"
    if "req" in first.first:
        yield f"  {_request(first)}"
    else:
        yield f"  {kind}"
    yield f"    {'':<28} {'A':<{_WIDTH}} B"
    for path, ours, theirs in first.fields[:_MOST_FIELDS]:
        yield f"    {path:<28} {_shown(ours):<{_WIDTH}} {_shown(theirs)}"
    if len(first.fields) > _MOST_FIELDS:
        yield f"    and {len(first.fields) - _MOST_FIELDS} more fields"
    if len(found) > 1:
        tests = len({difference.test for difference in found})
        yield f"    {len(found) - 1} more of this kind, in {tests} tests"
    yield ""


def _request(difference: Difference) -> str:
    """Return the call as it was made: ``vm0 KVM_ENABLE_CAP(cap=121, args[0]=24)``."""
    call = difference.first if "arg" in difference.first else difference.second
    argument = call.get("arg", 0)
    if isinstance(argument, Mapping):
        text = ", ".join(f"{path}={_shown(value)}" for path, value in list(argument.items())[:_MOST_FIELDS])
        text += ", ..." if len(argument) > _MOST_FIELDS else ""
    elif call["req"] == _CHECK_EXTENSION and argument in set(KvmCap):
        text = KvmCap(argument).name
    else:
        text = _shown(argument)
    return f"{call.get('obj', '')} {call['req']}({text})".strip()


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = hex(value) if isinstance(value, int) and abs(value) >= _DECIMAL_BELOW else str(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."

"""KTAP (Documentation/dev-tools/ktap.rst) and TAP 13, which kselftests still print and some CI parses better."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status

_FAILED: Final = (Status.FAIL, Status.ERROR, Status.MISS)


def _word(result: Result) -> str:
    return "not ok" if result.status in _FAILED else "ok"


def _directive(result: Result) -> str:
    """Return ``SKIP``, ``XFAIL`` or ``ERROR`` with its reason, for what is neither a plain pass nor a failure."""
    reason = f" {_on_one_line(result.message)}" if result.message else ""
    match result.status:
        case Status.SKIP:
            return f"SKIP{reason}"
        case Status.XFAIL:
            return f"XFAIL{reason}"
        case Status.MISS:
            return f"ERROR infrastructure:{reason}"
        case Status.ERROR:
            return f"ERROR{reason}"
        case _:
            return ""


def _on_one_line(text: str) -> str:
    return printable(re.sub(r"\s+", " ", text).strip().replace("#", ""))


def _name(text: str) -> str:
    """Keep the line parsable: a description has no hash and no line break."""
    return printable(re.sub(r"[#\s]+", "_", text))


def _diagnostics(result: Result, indent: str) -> Iterable[str]:
    if result.status in _FAILED:
        for line in printable(_told(result)).split("\n"):
            yield f"{indent}# {line}".rstrip()


def _told(result: Result) -> str:
    """Return message and details, the message once."""
    if result.message in result.details:
        return result.details.strip()
    return f"{result.message}\n{result.details}".strip()


def _groups(results: Results) -> list[tuple[str, Sequence[Result]]]:
    """Return the results by host and suite; a name tells the host only if there are several."""
    several = len({result.host for result in results.results}) > 1
    order = sorted(results.results, key=lambda result: (result.host, result.suite))
    return [
        (_name(f"{suite}[{host}]" if several and host else suite), list(group))
        for (host, suite), group in groupby(order, key=lambda result: (result.host, result.suite))
    ]


def render_ktap(results: Results) -> str:
    """Return KTAP version 1: a subtest per suite and host, diagnostics before the line they belong to."""
    groups = _groups(results)
    lines = ["KTAP version 1", f"1..{len(groups)}"]
    for number, (name, group) in enumerate(groups, 1):
        lines += ["  KTAP version 1", f"  # Subtest: {name}", f"  1..{len(group)}"]
        for index, result in enumerate(group, 1):
            lines += _diagnostics(result, "  ")
            directive = _directive(result)
            lines.append(f"  {_word(result)} {index} {_name(result.test)}{f' # {directive}' if directive else ''}")
        whole = "not ok" if any(result.status in _FAILED for result in group) else "ok"
        skipped = " # SKIP" if all(result.status is Status.SKIP for result in group) else ""
        lines.append(f"{whole} {number} {name}{skipped}")
    return "\n".join(lines) + "\n"


def render_tap13(results: Results) -> str:
    """Return TAP version 13: one flat list, with a YAML block under each failure."""
    lines = ["TAP version 13", f"1..{len(results.results)}"]
    number = 0
    for name, group in _groups(results):
        for result in group:
            number += 1
            # TAP 13 knows SKIP and TODO only.
            directive = _directive(result).replace("XFAIL", "TODO", 1) if not result.status.is_bad else ""
            if result.status is Status.MISS:
                directive = ""
            word = "not ok" if result.status is Status.XFAIL else _word(result)
            lines.append(f"{word} {number} - {name}::{_name(result.test)}{f' # {directive}' if directive else ''}")
            if result.status in _FAILED:
                # A JSON text is a YAML scalar, whatever is in it.
                lines += [
                    "  ---",
                    f"  message: {json.dumps(result.message)}",
                    f"  severity: {result.status.value.lower()}",
                    f"  duration_ms: {result.duration_s * 1000:.3f}",
                    f"  details: {json.dumps(result.details)}",
                    "  ...",
                ]
    return "\n".join(lines) + "\n"

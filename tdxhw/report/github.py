"""GitHub Actions: a step summary in Markdown, and annotations on the lines that failed."""

import re
from collections import Counter
from typing import Final

from tdxhw.report.compare import Change, Comparison
from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status

# GitHub shows ten annotations of a kind per step, and refuses a summary of more than one MiB.
_ANNOTATIONS: Final = 10
_SUMMARY_LIMIT: Final = 1 << 20
_FAILURES_SHOWN: Final = 50
_PLACE: Final = re.compile(r"^(?P<file>[^\s:]+\.py):(?P<line>\d+): \S+$", re.MULTILINE)
_SIGN: Final = {
    Status.PASS: "✅", Status.FAIL: "❌", Status.ERROR: "💥", Status.MISS: "🔌", Status.XFAIL: "➖", Status.SKIP: "⏭️",
}  # fmt: skip


def _cell(text: str) -> str:
    """Escape text for a table cell: no cell ends early, nothing becomes HTML or a link."""
    return re.sub(r"([\\`*_{}\[\]<>#|!@])", r"\\\1", printable(re.sub(r"\s+", " ", text)))


def _fence(text: str) -> str:
    """Return a code block that nothing in the text can end."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _command(text: str) -> str:
    """Escape the message of a workflow command."""
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape a property of a workflow command."""
    return _command(text).replace(":", "%3A").replace(",", "%2C")


def _title(result: Result) -> str:
    return f"{result.name}[{result.host}]" if result.host else result.name


def annotations(results: Results) -> str:
    """Return workflow commands: an error for each failure, and a warning if hosts were lost."""
    lines = []
    failures = [result for result in results.by_severity() if result.status.is_bad]
    for result in failures[:_ANNOTATIONS]:
        places = _PLACE.findall(result.details)
        place = f"file={_property(places[-1][0])},line={places[-1][1]}," if places else ""
        message = _command(result.message or result.status.value)
        lines.append(f"::error {place}title={_property(_title(result))}::{message}")
    if len(failures) > _ANNOTATIONS:
        lines.append(f"::notice title=tdxhw::{len(failures) - _ANNOTATIONS} more failures are in the step summary")
    missed = Counter(result.host or "a host" for result in results.results if result.status is Status.MISS)
    for host, count in missed.items():
        lines.append(f"::warning title={_property(host)}::{count} tests were lost with the host or the way to it")
    return "".join(line + "\n" for line in lines)


def summary(results: Results) -> str:
    """Return the step summary: totals, where it ran, a table by suite, failures with their traceback."""
    total = len(results.results)
    bad = sum(result.status.is_bad for result in results.results)
    missed = results.count(Status.MISS)
    verdict = (
        f"❌ {bad} of {total} failed" if bad else f"🔌 {missed} of {total} were lost" if missed else f"✅ {total} run"
    )
    parts = [f"## tdxhw: {verdict}", _where(results), _suites(results)]
    parts += [f"> [!WARNING]\n> {_cell(note)}" for note in results.notes]
    size = sum(len(part.encode()) for part in parts)
    failures = [result for result in results.by_severity() if result.status.is_bad]
    for shown, result in enumerate(failures):
        text = f"{result.message}\n\n{result.details}".strip()
        part = (
            f"<details><summary>{_SIGN[result.status]} {_html(_title(result))}</summary>\n\n{_fence(text)}\n</details>"
        )
        size += len(part.encode())
        if shown == _FAILURES_SHOWN or size > _SUMMARY_LIMIT - 1024:
            parts.append(f"… and {len(failures) - shown} more.")
            break
        parts.append(part)
    return "\n\n".join(parts) + "\n"


def _html(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _where(results: Results) -> str:
    """Say where it ran; a simulator says so in words."""
    places = Counter(
        (
            result.host,
            result.is_simulated,
            result.provenance.get("kernel", "?"),
            result.provenance.get("tdx_module", "?"),
        )
        for result in results.results
    )
    lines = ["| host | | kernel | TDX module | tests |", "|---|---|---|---|---:|"]
    for (host, simulated, kernel, module), count in sorted(places.items()):
        kind = "simulated" if simulated else "hardware"
        lines.append(f"| {_cell(host or '?')} | {kind} | {_cell(kernel)} | {_cell(module)} | {count} |")
    return "\n".join(lines)


def _suites(results: Results) -> str:
    statuses = [status for status in _SIGN if results.count(status)]
    lines = [
        "| suite | " + " | ".join(f"{_SIGN[status]} {status.value.lower()}" for status in statuses) + " | time |",
        "|---|" + "---:|" * (len(statuses) + 1),
    ]
    for suite in dict.fromkeys(result.suite for result in results.results):
        here = [result for result in results.results if result.suite == suite]
        counts = [str(sum(result.status is status for result in here) or "") for status in statuses]
        lines.append(f"| {_cell(suite)} | {' | '.join(counts)} | {sum(r.duration_s for r in here):.1f} s |")
    return "\n".join(lines)


def comparison_summary(comparison: Comparison) -> str:
    """Return a comparison as Markdown."""
    regressions = len(comparison.of(Change.REGRESSION))
    lines = [f"## tdxhw compare: {f'❌ {regressions} regressed' if regressions else '✅ no regression'}", ""]
    if comparison.conditions:
        lines += ["| differs | BASE | NEW |", "|---|---|---|"]
        for key, (base, new) in comparison.conditions.items():
            lines.append(f"| {key} | {_cell(', '.join(base) or '-')} | {_cell(', '.join(new) or '-')} |")
        lines.append("")
    changed = [entry for entry in comparison.entries if entry.change is not Change.UNCHANGED]
    if changed:
        lines += ["| change | test | where | now |", "|---|---|---|---|"]
        for entry in changed[:500]:
            where = " ".join(part for part in (entry.variant, entry.host) if part)
            lines.append(f"| {entry.change.value} | {_cell(entry.name)} | {_cell(where)} | {_cell(entry.message)} |")
        if len(changed) > 500:
            lines.append(f"\n… and {len(changed) - 500} more.")
    lines += [f"\n> [!NOTE]\n> {_cell(note)}" for note in comparison.notes]
    return "\n".join(lines) + "\n"

"""One self-contained HTML page: opens without a network, failures first, filters by host, suite, kernel, module."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Final

from tdxhw.report.errors import ReportError
from tdxhw.report.plain_text import printable
from tdxhw.report.results import SEVERITY, Result, Results, Status
from tdxhw.report.trends import HEIGHT, WIDTH, Trends

_LABELS: Final = {
    Status.PASS: "passed",
    Status.FAIL: "failed",
    Status.ERROR: "broke",
    Status.MISS: "lost with the host",
    Status.XFAIL: "failed as expected",
    Status.SKIP: "skipped",
}
_FILTERS: Final = ("host", "suite", "kernel", "module", "backend")


def _value(result: Result, key: str) -> str:
    match key:
        case "host":
            return result.host or "-"
        case "suite":
            return result.suite
        case "backend":
            return "simulator" if result.is_simulated else "hardware"
        case "module":
            return result.provenance.get("tdx_module", "-")
        case _:
            return result.provenance.get(key, "-")


def render(results: Results, *, title: str = "tdxhw results", trends: Sequence[Trends] = ()) -> str:
    """Return the page, with `trends` over kernels if given. ``ReportError`` if Jinja2 is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ReportError("the HTML page is made with Jinja2: pip install 'tdxhw[lab]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    template = environment.from_string(files("tdxhw.report").joinpath("page.html").read_text(encoding="utf-8"))
    rows = [
        {
            "result": result,
            "status": result.status.value,
            "values": {key: _value(result, key) for key in _FILTERS},
            "open": result.status.is_bad,
        }
        for result in results.by_severity()
    ]
    choices = {key: sorted({_value(result, key) for result in results.results}) for key in _FILTERS}
    started = [result.started for result in results.results if result.started]
    page = template.render(
        title=title,
        rows=rows,
        statuses=[(status.value, _LABELS[status], count) for status in SEVERITY if (count := results.count(status))],
        choices=choices,
        notes=results.notes,
        sources=results.sources,
        duration_s=results.duration_s,
        started=datetime.fromtimestamp(min(started), UTC).strftime("%Y-%m-%d %H:%M UTC") if started else "",
        trends=trends,
        size=(WIDTH, HEIGHT),
        only_simulated=all(result.is_simulated for result in results.results) and bool(rows),
    )
    return page + "\n"

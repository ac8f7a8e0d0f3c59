"""What `tdxhw run --on lab:…` shows and writes."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdxhw.console import table_console
from tdxhw.lab.fleet import FleetRun, run_on_lab
from tdxhw.lab.host_run import Wish
from tdxhw.report import junit as junit_xml
from tdxhw.report.cli import write
from tdxhw.report.results import SEVERITY


def run_fleet(
    expression: str,
    suites: tuple[str, ...],
    promises: tuple[str, ...],
    keyword: str,
    time_limit_s: float,
    *,
    junit: Path | None,
    report_log: Path | None,
    as_json: bool,
) -> int:
    """Run, show results as they come, write the reports, and return the exit code."""
    wish = Wish(suites, promises, keyword, time_limit_s)
    fleet = run_on_lab(expression, wish, on_line=(lambda _line: None) if as_json else click.echo)
    if junit is not None:
        write(junit, junit_xml.render(fleet.results))
    if report_log is not None:
        write(report_log, fleet.log)
    if as_json:
        click.echo(json.dumps(fleet.as_json(), indent=1))
    else:
        _show(table_console(), fleet)
    for problem in fleet.problems:
        click.echo(f"tdxhw: {problem}", err=True)
    return fleet.exit_code


def _show(console: Console, fleet: FleetRun) -> None:
    for result in fleet.results.by_severity():
        if result.status.is_bad:
            console.print(Text(f"\n{result.status.value} [{result.host}] {result.name}: {result.message}", style="red"))
            console.print(Text(result.details))
    statuses = [status for status in SEVERITY if fleet.results.count(status)]
    table = Table("host", "suite", *(status.value.lower() for status in statuses), "time", box=None, pad_edge=False)
    for host, suite in dict.fromkeys((result.host, result.suite) for result in fleet.results.results):
        here = [result for result in fleet.results.results if (result.host, result.suite) == (host, suite)]
        counts = (str(sum(result.status is status for result in here)) for status in statuses)
        table.add_row(Text(host), Text(suite), *counts, f"{sum(result.duration_s for result in here):.2f} s")
    console.print(table)

"""Show a run on a terminal (live progress) or in a pipe (plain lines, no escape codes)."""

import os
import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tdxhw.results import OUTCOMES, Result, RunRecord

_STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "skipped": "yellow"}
_BRIEF = 80
"""A fact that is longer gets a line of its own [characters]."""
_PLAIN_WIDTH = 200  # a pipe has no width; wrapping would break grep
_ANY_WIDTH = 1000
"""What no table reaches [characters]."""


def table_console() -> Console:
    """Return a console for tables: as wide as the terminal, or in a pipe as wide as they are, so that grep finds it."""
    console = Console(highlight=False)
    if not console.file.isatty():  # not `is_terminal`: CI systems set FORCE_COLOR
        console.width, console.soft_wrap = _ANY_WIDTH, True
    return console


class _Console(Console):
    """A console whose reader may go away: ``tdxhw run | head``."""

    def on_broken_pipe(self) -> None:
        """Write nothing more, and end the run as Ctrl-C would: results so far are kept in the files."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise KeyboardInterrupt


class ConsoleDisplay:
    """Progress while it runs, then failures, then one line per suite."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._live = stream.isatty()
        self._console = _Console(
            file=stream, highlight=False, soft_wrap=not self._live, width=None if self._live else _PLAIN_WIDTH,
            no_color=None if self._live else True, force_terminal=self._live,  # None: NO_COLOR decides
        )  # fmt: skip
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self._console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._progress.add_task("collecting", total=None)
        self._suite = ""

    def started(self, record: RunRecord) -> None:
        """Show where the results will come from."""
        self._console.print(f"tdxhw run on {record.backend} ({escape(record.reason)})")
        for name, provenance in record.hosts.items():
            facts = [f"{key} {value}" for key, value in provenance.items()]
            brief = ", ".join(fact for fact in facts if len(fact) <= _BRIEF)
            self._console.print(f"  {escape(f'[{name}]')} {escape(brief)}")
            for fact in facts:
                if len(fact) > _BRIEF:
                    self._console.print(f"    {escape(fact)}")
        if self._live:
            self._progress.start()

    def collected(self, record: RunRecord) -> None:
        """Set the length of the bar."""
        self._progress.update(self._task, total=record.planned)

    def running(self, suite: str, test: str) -> None:
        """Name the running test beside the bar."""
        self._progress.update(self._task, description=escape(f"{suite}: {test}"))

    def finished_test(self, result: Result) -> None:
        """Print one line for one result."""
        if result.suite != self._suite:
            self._suite = result.suite
            self._console.print(f"\n{result.suite}")
        style = _STYLES[result.outcome]
        where = escape(f"[{result.host}]") if result.host else ""
        line = f"  [{style}]{result.outcome:<7}[/] {where:<11} {escape(result.test)} ({result.duration_s * 1e3:.0f} ms)"
        if result.reason:
            line += f": {escape(result.reason)}"
        self._console.print(line)
        self._progress.advance(self._task)

    def finished(self, record: RunRecord) -> None:
        """Print the failures, then the table of suites."""
        self._progress.stop()
        for result in record.results:
            if result.outcome in ("failed", "error"):
                where = f"[{result.host}]" if result.host else ""
                self._console.print(
                    f"\n[bold red]{result.outcome.upper()}[/] {escape(f'{result.suite}::{result.test}{where}')}"
                )
                self._console.print(escape(f"  {result.reason}"), style="bold")
                self._console.print(escape(result.details.rstrip()))
        if record.results:
            self._console.print()
            self._console.print(self._summary(record))
        if record.interrupted:
            self._console.print(f"interrupted after {len(record.results)} of {record.planned} tests")

    def _summary(self, record: RunRecord) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("suite")
        for outcome in OUTCOMES:
            table.add_column(outcome, justify="right")
        table.add_column("time", justify="right")
        for suite in record.suites():
            spent = sum(result.duration_s for result in record.results if result.suite == suite)
            counts = [str(record.count(outcome, suite)) for outcome in OUTCOMES]
            table.add_row(suite, *counts, f"{spent:.2f} s")
        totals = [str(record.count(outcome)) for outcome in OUTCOMES]
        table.add_row("total", *totals, f"{record.duration_s:.2f} s", style="bold")
        return table


class SilentDisplay:
    """Shows nothing: ``--json`` owns stdout."""

    def started(self, record: RunRecord) -> None:
        """Show nothing."""

    def collected(self, record: RunRecord) -> None:
        """Show nothing."""

    def running(self, suite: str, test: str) -> None:
        """Show nothing."""

    def finished_test(self, result: Result) -> None:
        """Show nothing."""

    def finished(self, record: RunRecord) -> None:
        """Show nothing."""

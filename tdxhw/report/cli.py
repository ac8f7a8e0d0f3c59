"""The subcommands ``tdxhw report`` and ``tdxhw compare``."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdxhw.console import table_console
from tdxhw.report import github, html, json_lines, junit, kcidb, tap
from tdxhw.report.compare import Change, Comparison
from tdxhw.report.compare import compare as compare_results
from tdxhw.report.errors import ReportError
from tdxhw.report.plain_text import printable
from tdxhw.report.read import read_all
from tdxhw.report.results import Results
from tdxhw.report.trends import Trends, trends

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_COLOUR: Final = {
    Change.REGRESSION: "bold red",
    Change.NEW_FAILURE: "red",
    Change.FLAKY: "yellow",
    Change.LOST: "magenta",
    Change.GONE: "magenta",
    Change.STILL_FAILING: "red",
    Change.FIX: "green",
    Change.NEW: "cyan",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write results."""

    option: str
    text: str
    render: Callable[[Results], str]


FORMATS: Final = (
    Format("junit", "JUnit XML", junit.render),
    Format("ktap", "KTAP version 1", tap.render_ktap),
    Format("tap", "TAP version 13", tap.render_tap13),
    Format("jsonl", "JSON lines", json_lines.render),
    Format("html", "one self-contained page", html.render),
    Format("markdown", "GitHub-flavoured Markdown", github.summary),
)


def write(path: Path, text: str) -> None:
    """Write a report, whole or not at all; ``-`` is standard output. ``ReportError`` if it cannot be written."""
    write_all(path, (text,))


def write_all(path: Path, texts: Iterable[str]) -> None:
    """Write what may be too long to be one text, one after the other, like `write`.

    A device or a pipe (``/dev/stdout``, ``/dev/null``) is written to, never replaced, and so is what a link leads to.
    """
    if str(path) == "-":
        for text in texts:
            click.echo(text, nl=False)
        return
    is_replaced = not path.is_symlink() and (path.is_file() or not path.exists())
    partial = path.with_name(path.name + ".part") if is_replaced else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(texts)
        if is_replaced:
            partial.replace(path)
    except BaseException as error:
        if is_replaced:
            with suppress(OSError):
                partial.unlink()
        if isinstance(error, OSError):
            raise ReportError(f"{path}: cannot write it: {error.strerror}") from error
        raise


def _with_formats(command: Callable[..., None]) -> Callable[..., None]:
    for entry in reversed(FORMATS):
        command = click.option(f"--{entry.option}", type=_FILE, metavar="FILE", help=f"Write {entry.text}.")(command)
    return command


@click.command("report")
@click.argument("results", nargs=-1, required=True, type=_FILE)
@_with_formats
@click.option("--kcidb", "kcidb_file", type=_FILE, metavar="FILE", help="Write a KCIDB 5.3 submission.")
@click.option("--kcidb-origin", default="tdxhw", show_default=True, help="The CI system that submits.")
@click.option("--kcidb-checkout", metavar="ID", help="Checkout that the builds belong to.")
@click.option("--kcidb-build", metavar="ID", help="Build that was tested; else one is made per kernel release.")
@click.option("--git-commit", metavar="SHA1", help="Commit of the tested kernel.")
@click.option("--github", "github_", is_flag=True, help="Annotate, and add to the step summary of this workflow.")
@click.option("--history", metavar="FILE|URL", help="Add trends over kernels to the HTML page.")
def report(
    results: tuple[Path, ...],
    kcidb_file: Path | None,
    kcidb_origin: str,
    kcidb_checkout: str | None,
    kcidb_build: str | None,
    git_commit: str | None,
    history: str | None,
    *,
    github_: bool,
    **formats: Path | None,
) -> None:
    """Turn RESULTS of one or more runs into reports; `-` as FILE is standard output.

    RESULTS are what `tdxhw run --report-log` or `--json` wrote, or JSON lines of this command.
    """
    merged = read_all(results)
    wanted = [(entry, path) for entry in FORMATS if (path := formats[entry.option]) is not None]
    if history is not None and formats["html"] is None:
        raise ReportError("--history adds trends to the HTML page: --html says where that goes")
    for entry, path in wanted:
        if entry.option == "html" and history is not None:
            write(path, html.render(merged, trends=_trends(merged, history)))
        else:
            write(path, entry.render(merged))
    if kcidb_file is not None:
        submission = kcidb.Submission(kcidb_origin, kcidb_checkout, kcidb_build, git_commit)
        write(kcidb_file, json.dumps(kcidb.document(merged, submission), indent=1) + "\n")
    if github_:
        _tell_github(merged)
    if not wanted and kcidb_file is None and not github_:
        counts = ", ".join(f"{count} {status}" for status, count in merged.counts.items())
        click.echo(f"{len(merged.results)} results: {counts or 'none'}")
        for note in merged.notes:
            click.echo(note)


def _trends(results: Results, history: str) -> list[Trends]:
    """Return how the tests of these results did over kernels, hardware and simulator each for itself."""
    from tdxhw.history.cli import open_history

    found = []
    with open_history(history, create=False) as opened:
        from tdxhw.history.queries import over_kernels

        for kind, simulated in (("hardware", False), ("the simulator", True)):
            here = [result for result in results.results if result.is_simulated is simulated]
            if not here:
                continue
            names = sorted({result.name for result in here})
            # A simulated host has one kernel, its profile's: over kernels it is over hosts.
            hosts = None if simulated else sorted({result.host for result in here})
            points = over_kernels(opened.database, names, hosts=hosts, simulated=simulated)
            on_page = {result.provenance["kernel"] for result in here if "kernel" in result.provenance}
            found.append(trends(kind, hosts or (), points, sorted(on_page)))
    return found


def _tell_github(results: Results) -> None:
    click.echo(github.annotations(results), nl=False)
    _add_to_step_summary(github.summary(results))


def _add_to_step_summary(text: str) -> None:
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        raise ReportError("--github works in a GitHub workflow only: GITHUB_STEP_SUMMARY is not set")
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ReportError(f"{path}: cannot write it: {error.strerror}") from error


@click.command("compare")
@click.argument("base", type=_FILE)
@click.argument("new", type=_FILE)
@click.option("--also-base", multiple=True, type=_FILE, metavar="FILE", help="A further run of BASE; repeatable.")
@click.option("--also-new", multiple=True, type=_FILE, metavar="FILE", help="A further run of NEW, such as a retry.")
@click.option("--across-backends", is_flag=True, help="Compare simulator with hardware, and say so.")
@click.option("--strict", is_flag=True, help="New failures, flaky, gone and no longer run tests fail, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--github", "github_", is_flag=True, help="Add to the step summary of this workflow.")
@click.pass_context
def compare(
    ctx: click.Context,
    base: Path,
    new: Path,
    also_base: tuple[Path, ...],
    also_new: tuple[Path, ...],
    *,
    across_backends: bool,
    strict: bool,
    as_json: bool,
    github_: bool,
) -> None:
    """Say what became better, worse and flaky from BASE to NEW. Only like is compared with like.

    Exit code 0: no regression; 1: at least one; 2: they cannot be compared.
    """
    sides = read_all([base, *also_base]), read_all([new, *also_new])
    comparison = compare_results(*sides, across_backends=across_backends)
    strict_changes = (Change.NEW_FAILURE, Change.FLAKY, Change.LOST, Change.GONE)
    is_bad = comparison.has_regressed or (strict and any(comparison.of(change) for change in strict_changes))
    if as_json:
        click.echo(json.dumps(_document(comparison, is_bad=is_bad), indent=1))
    else:
        _show(table_console(), comparison)
    if github_:
        _add_to_step_summary(github.comparison_summary(comparison))
    if not any(entry.base and entry.new for entry in comparison.entries):
        raise ReportError("no test is in BASE and in NEW: nothing was compared")
    ctx.exit(1 if is_bad else 0)


def _document(comparison: Comparison, *, is_bad: bool) -> dict[str, object]:
    return {
        "verdict": "worse" if is_bad else "no-regression",
        "counts": comparison.counts,
        "conditions": {
            key: {"base": list(base), "new": list(new)} for key, (base, new) in comparison.conditions.items()
        },
        "notes": list(comparison.notes),
        "entries": [entry.to_json() for entry in comparison.entries],
    }


def _text(told: str) -> Text:
    """Return text from a test, which may have it from a guest: nothing in it is for the terminal."""
    return Text(printable(told), overflow="fold")


def _show(console: Console, comparison: Comparison) -> None:
    for key, (base, new) in comparison.conditions.items():
        console.print(_text(f"{key}: {', '.join(base) or '-'} → {', '.join(new) or '-'}"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(printable(f"note: {note}"), style="yellow"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for entry in comparison.entries:
        if entry.change is Change.UNCHANGED:
            continue
        where = " ".join(part for part in (entry.variant, entry.host) if part)
        table.add_row(
            Text(entry.change.value, style=_COLOUR[entry.change]), _text(entry.name), _text(where),
            _text(entry.message),
        )  # fmt: skip
    for entry in comparison.entries:
        if entry.slowdown:
            where = " ".join(part for part in (entry.variant, entry.host) if part)
            name = _text(entry.name)
            table.add_row(Text("slower"), name, _text(where), Text(f"{entry.slowdown:.1f} times as long"))
    if table.row_count:
        console.print(table)
    counts = ", ".join(f"{count} {kind}" for kind, count in comparison.counts.items())
    verdict = "regressed" if comparison.has_regressed else "no regression"
    console.print(Text(f"{verdict}: {counts}"), soft_wrap=True)

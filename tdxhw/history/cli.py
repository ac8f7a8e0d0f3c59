"""The subcommand ``tdxhw history``."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdxhw.history.errors import HistoryError
from tdxhw.history.since import Since
from tdxhw.report.plain_text import printable

if TYPE_CHECKING:
    from tdxhw.history.store import History

VARIABLE: Final = "TDXHW_HISTORY"
"""Names the history where ``--db`` does not: a file or a URL. May hold a password, so it is never shown."""

_COLOUR: Final = {"PASS": "green", "FAIL": "bold red", "ERROR": "red", "MISS": "yellow"}
_VERDICT_COLOUR: Final = {"GOOD": "green", "REGRESSED": "bold red", "INCONCLUSIVE": "yellow"}


def open_history(where: str | None, *, create: bool) -> "History":
    """Open the history that is meant: `where`, ``TDXHW_HISTORY``, or the user's own file."""
    try:
        from tdxhw.history.database import default_path
        from tdxhw.history.store import History
    except ModuleNotFoundError as error:
        raise HistoryError("the history is kept with SQLAlchemy: pip install 'tdxhw[validate]'") from error
    return History.open(where or os.environ.get(VARIABLE) or default_path(), create=create)


_DB: Final = click.option(
    "--db", metavar="FILE|URL", help=f"The history [${VARIABLE}, else $XDG_STATE_HOME/tdxhw/history.sqlite]."
)
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
_SINCE: Final = click.option("--since", type=Since(), default=0.0, help="Only runs since then.")
_FILTERS: Final = {
    "kernel": click.option("--kernel", default="", metavar="RELEASE", help="Only under this kernel, as in 6.18*."),
    "host": click.option("--host", default="", metavar="NAME", help="Only on this host."),
    "module": click.option("--module", default="", metavar="VERSION", help="Only with this TDX module."),
    "test": click.option("--test", default="", metavar="NAME", help="Only this test."),
    "simulated": click.option(
        "--simulated/--hardware", default=None, help="Only the simulator's, or only hardware's. [both]"
    ),
}
_LIMIT: Final = click.option("--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True, metavar="N")


def _asking(*filters: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        for option in (_JSON, _LIMIT, _SINCE, *(_FILTERS[name] for name in reversed(filters)), _DB):
            command = option(command)
        return command

    return with_options


@click.group("history")
def history() -> None:
    """Keep the results of all runs, and answer questions about them."""


@history.command("add")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@_DB
def add(results: tuple[Path, ...], db: str | None) -> None:
    """Add RESULTS, each file a run. What is there already is not added again.

    RESULTS are what `tdxhw run --report-log` or `--json` wrote, or JSON lines of `tdxhw report`.
    """
    from tdxhw.report.read import read

    runs = [(path, read(path)) for path in results]
    with open_history(db, create=True) as opened:
        from tdxhw.history.store import RunRecord

        for path, found in runs:
            added = opened.add(RunRecord(), found)
            known = f", {added.known} known already" if added.known else ""
            click.echo(f"{path}: run {added.run_id}, {added.new} results added{known}")


@history.command("runs")
@_asking("kernel", "host", "module", "test", "simulated")
def runs(db: str | None, *, since: float, limit: int, as_json: bool, **filters: Any) -> None:
    """Show the latest runs."""
    with open_history(db, create=False) as opened:
        from tdxhw.history import queries

        lines = queries.runs(opened.database, queries.Wanted(since=since, **filters), limit=limit)
    if as_json:
        _print_json(lines)
        return
    table = _table("run", "begun (UTC)", "kernel", "host", "TDX module", "results", "verdict")
    for one in lines:
        verdict = Text(one.line or one.verdict, style=_VERDICT_COLOUR.get(one.verdict, ""))
        places = (", ".join(part) or "-" for part in (one.kernels, one.hosts, one.modules))
        table.add_row(str(one.id), _when(one.started), *map(_text, places), _counted(one.counts), verdict)
    _show(table, "no run")


@history.command("test", short_help="Show how a test did, run by run.")
@click.argument("name")
@_asking("kernel", "host", "module", "simulated")
def test(
    name: str, db: str | None, *, since: float, limit: int, as_json: bool, simulated: bool | None, **filters: str
) -> None:
    """Show how the test NAME did: suite::test, a part of that, or a pattern."""
    with open_history(db, create=False) as opened:
        from tdxhw.history import queries

        wanted = queries.Wanted(test=name, since=since, simulated=simulated, **filters)
        lines = queries.of_test(opened.database, wanted, limit=limit)
    if as_json:
        _print_json(lines)
        return
    table = _table("run", "begun (UTC)", "test", "kernel", "host", "TDX module", "", "time", "")
    for one in lines:
        where = f"{one.host}{' (simulated)' if one.simulated else ''}"
        table.add_row(
            str(one.run), _when(one.started), _text(one.test), _text(one.kernel), _text(where), _text(one.module),
            Text(one.status, style=_COLOUR.get(one.status, "")), f"{one.duration_s:.3f} s", _text(one.message),
        )  # fmt: skip
    _show(table, "no result")


def _about(kind: str, metavar: str, text: str) -> click.Command:
    others = [name for name in ("kernel", "host", "module", "test", "simulated") if name != kind]

    @click.argument("name", metavar=metavar)
    @_asking(*others)
    def command(
        name: str, db: str | None, *, since: float, limit: int, as_json: bool, simulated: bool | None, **filters: str
    ) -> None:
        with open_history(db, create=False) as opened:
            from tdxhw.history import queries

            about: dict[str, Any] = {kind: name, **filters}
            wanted = queries.Wanted(since=since, simulated=simulated, **about)
            places = queries.environments(opened.database, wanted)
            bad = queries.failing(opened.database, wanted, limit=limit)
        if as_json:
            _print_json({"environments": [asdict(one) for one in places], "failing": [asdict(one) for one in bad]})
            return
        table = _table("kernel", "TDX module", "host", "results", "in tests")
        for one in places:
            where = f"{one.host}{' (simulated)' if one.simulated else ''}"
            table.add_row(
                _text(one.kernel), _text(one.module), _text(where), _counted(one.counts), f"{one.duration_s:.1f} s"
            )
        _show(table, "no result")
        if bad:
            click.echo()
            _show_failing(bad)

    return history.command(kind, help=text)(command)


kernel = _about("kernel", "RELEASE", "Show what ran under the kernel RELEASE, and what failed.")
host = _about("host", "NAME", "Show what ran on the host NAME, and what failed.")
module = _about("module", "VERSION", "Show what ran with the TDX module VERSION, and what failed.")


@history.command("flaky", short_help="Show tests that passed and failed under the same conditions.")
@_asking("kernel", "host", "module", "test", "simulated")
def flaky(db: str | None, *, since: float, limit: int, as_json: bool, **filters: Any) -> None:
    """Show tests that passed and failed on the same host with the same kernel, module and everything else."""
    with open_history(db, create=False) as opened:
        from tdxhw.history import queries

        lines = queries.failing(opened.database, queries.Wanted(since=since, **filters), only_flaky=True, limit=limit)
    if as_json:
        _print_json(lines)
    else:
        _show_failing(lines)


@history.command("export", short_help="Write results as JSON lines.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default="-")
@_DB
@_SINCE
@_FILTERS["simulated"]
@_FILTERS["test"]
@_FILTERS["module"]
@_FILTERS["host"]
@_FILTERS["kernel"]
def export(file: Path, db: str | None, *, since: float, **filters: Any) -> None:
    """Write results as JSON lines to FILE [standard output]: `tdxhw report`, `compare` and `history add` read them."""
    from tdxhw.report.cli import write_all

    with open_history(db, create=False) as opened:
        from tdxhw.history import queries

        results = queries.export(opened.database, queries.Wanted(since=since, **filters))
        write_all(file, (json.dumps(one.to_json(), sort_keys=True) + "\n" for one in results))


# ---- how it looks ----


def _show_failing(lines: Sequence[Any]) -> None:
    table = _table("test", "failed", "kernel", "TDX module", "host", "its latest failure")
    for one in lines:
        where = f"{one.host}{' (simulated)' if one.simulated else ''}"
        table.add_row(
            _text(one.test), f"{one.failed} of {one.passed + one.failed}", _text(one.kernel), _text(one.module),
            _text(where), _text(one.message),
        )  # fmt: skip
    _show(table, "none")


def _table(*names: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(name, style="bold") for name in names))
    return table


def _show(table: Table, nothing: str) -> None:
    if table.row_count == 1:
        click.echo(nothing)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no width: let grep see whole lines
        console.soft_wrap = True
    console.print(table)


def _text(told: str) -> Text:
    return Text(printable(told) or "-")


def _counted(counts: Mapping[str, int]) -> Text:
    return Text(", ").join(Text(f"{count} {status}", style=_COLOUR.get(status, "")) for status, count in counts.items())


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M") if at else "-"


def _print_json(document: dict[str, Any] | Sequence[Any]) -> None:
    whole = document if isinstance(document, dict) else [asdict(one) for one in document]
    click.echo(json.dumps(whole, indent=1))

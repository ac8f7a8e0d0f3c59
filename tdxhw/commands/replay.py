"""``tdxhw replay``: play recordings of real hardware on the model, and say where it first differs."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from tdxhw.backends.sim import ReplayDivergence, replay_file
from tdxhw.errors import ReplayInputError

_PROGRESS_EVERY: Final = 500
"""Records between two updates of the progress line."""


@dataclass(slots=True)
class FileResult:
    """What replaying one file came to."""

    path: Path
    records: int = 0
    agreed: int = 0
    first: ReplayDivergence | None = None


@click.command(short_help="Play recordings of real hardware on the simulator.")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else.")
def replay(files: tuple[Path, ...], as_json: bool) -> int:
    """Play each FILE (.jsonl or .jsonl.gz) and compare every answer with the recorded one.

    The last line says how many records agree. Exit code: 0 all agree, 1 some differ, 2 a file cannot be read.
    """
    results = []
    for path in files:
        results.append(_replay(path))
        if not as_json:
            _show(results[-1])
    records, agreed = sum(r.records for r in results), sum(r.agreed for r in results)
    if as_json:
        click.echo(
            json.dumps({"files": [_as_json(r) for r in results], "records": records, "agreed": agreed}, indent=1)
        )
    else:
        click.echo(f"{agreed} of {records} records agree")
    return 0 if agreed == records else 1


def _replay(path: Path) -> FileResult:
    result = FileResult(path)
    live = sys.stderr.isatty()
    for found in replay_file(path):
        result.records += 1
        if found is None:
            result.agreed += 1
        elif result.first is None:
            result.first = found
        if live and result.records % _PROGRESS_EVERY == 0:
            click.echo(f"\r{path.name}: {result.records} records", err=True, nl=False)
    if live:
        click.echo("\r\x1b[K", err=True, nl=False)
    if not result.records:
        raise ReplayInputError(f"{path}: no records in it: empty, or its recorder ended before the first")
    return result


def _show(result: FileResult) -> None:
    click.echo(f"{result.path}: {result.agreed} of {result.records} records agree")
    if result.first is None:
        return
    first = result.first
    click.echo(f"  first divergence in line {first.line}{f': {first.note}' if first.note else ''}")
    click.echo(f"    record   {json.dumps(first.record)}")
    click.echo(f"    expected {first.expected}")
    click.echo(f"    got      {first.got}")


def _as_json(result: FileResult) -> dict[str, Any]:
    return {
        "file": str(result.path),
        "records": result.records,
        "agreed": result.agreed,
        "first_divergence": asdict(result.first) if result.first else None,
    }

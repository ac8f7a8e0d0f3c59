"""``tdxhw diff``: the same suites on two kernels, every call compared."""

import json
from pathlib import Path

import click

from tdxhw.errors import HarnessError


@click.command(short_help="Run suites on two kernels and compare every call.")
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option(
    "--on", "sides", multiple=True, required=True, metavar="sim|sim:PROFILE|local|FILE",
    help="A side; give it twice, or once with --record. FILE is a recording.",
)  # fmt: skip
@click.option(
    "--record", "record_to", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Save the calls of the one side, to compare with them on another machine (.jsonl, .jsonl.gz).",
)  # fmt: skip
@click.option("-k", "keyword", default="", metavar="EXPR", help="Only tests whose names match, as in pytest.")
@click.option(
    "--time-limit", "time_limit_s", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
    metavar="S", help="For each test [s].",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else.")
def diff(
    suites: tuple[str, ...],
    sides: tuple[str, ...],
    record_to: Path | None,
    keyword: str,
    time_limit_s: float,
    as_json: bool,
) -> int:
    """Run every SUITE, or those named, on both sides; compare each call's result, errno and output fields.

    A plain sim takes its capabilities, CPUID and MSR lists from the other side, so that behaviour is compared and not
    equipment; sim:PROFILE is that profile as it stands. The last line says how many calls were compared and how many
    differ. Exit code: 0 none differ, 1 some do, 2 a side cannot be had, 130 interrupted.
    """
    if len(sides) != (1 if record_to else 2):
        raise click.UsageError("give --on twice, or once together with --record FILE")
    from tdxhw.diff import recording, report
    from tdxhw.diff.compare import compare
    from tdxhw.diff.side import Wish, obtain, record_both

    wish = Wish(suites, keyword, time_limit_s, lambda line: click.echo(f"{line} ...", err=True))
    if record_to is not None:
        made = obtain(sides[0], wish)
        recording.write(made, record_to)
        calls = sum(len(test.calls) for test in made.tests.values())
        if as_json:
            click.echo(json.dumps({"file": str(record_to), "tests": len(made.tests), "calls": calls}))
        else:
            click.echo(f"{calls} calls of {len(made.tests)} tests recorded in {record_to}")
        return 0
    first, second = sides
    result = compare(*record_both(first, second, wish))
    if as_json:
        click.echo(json.dumps(report.document(result), indent=1))
    else:
        for line in report.lines(result):
            click.echo(line)
    if not result.compared:
        raise HarnessError("no test ran on both sides: nothing was compared")
    return 1 if result.differences else 0

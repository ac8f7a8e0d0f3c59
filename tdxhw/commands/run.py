"""``tdxhw run``: run suites on a real or a simulated /dev/kvm."""

import json
from pathlib import Path

import click

from tdxhw.errors import HarnessError


@click.command(short_help="Run suites on a real or a simulated /dev/kvm.")
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option(
    "--on",
    default="auto",
    show_default=True,
    metavar="auto|sim|local|lab:NAME|lab:all",
    help="Which /dev/kvm. auto: this machine's if it has TDX, else simulated. Several hosts: lab:NAME,NAME or "
    "lab:label=LABEL. They are described in labs/, or in the folder $TDXHW_LABS.",
)
@click.option(
    "--profile", "profiles", multiple=True, metavar="NAME",
    help="Simulated host (with --on sim); repeatable [mainline and v17].",
)  # fmt: skip
@click.option("--promise", "promises", multiple=True, metavar="CAPABILITY", help="Fail without it instead of skipping.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JUnit XML.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else.")
@click.option(
    "--report-log", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write each result as a line of JSON as soon as it is there; those of lab hosts at the end.",
)  # fmt: skip
@click.option("-k", "keyword", default="", metavar="EXPR", help="Only tests whose names match, as in pytest.")
@click.option("--list", "list_only", is_flag=True, help="Show the suites and what they are about.")
@click.option(
    "--time-limit", "time_limit_s", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
    metavar="S", help="For each test [s].",
)  # fmt: skip
@click.option(
    "--done", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Leave out the tests that FILE lists, one id a line: they have run already.",
)  # fmt: skip
def run(
    suites: tuple[str, ...],
    on: str,
    profiles: tuple[str, ...],
    promises: tuple[str, ...],
    junit: Path | None,
    as_json: bool,
    report_log: Path | None,
    keyword: str,
    list_only: bool,
    time_limit_s: float,
    done: Path | None,
) -> int:
    """Run every SUITE, or those named; a path runs suites of your own.

    Exit code: 0 all passed, 1 a test failed, 2 the run could not be done, 130 interrupted (results so far are
    written).
    """
    from tdxhw import runner
    from tdxhw.console import ConsoleDisplay, SilentDisplay

    if list_only:
        for name, path in runner.suite_files().items():
            click.echo(f"{name:<20} {_first_line(path)}")
        return 0
    if on.startswith("lab:"):
        if profiles:
            raise HarnessError("--profile names a simulated host: add --on sim")
        if done:
            raise HarnessError("--done is for a run on one host: add --on local or --on sim")
        for file in (junit, report_log):
            runner.check_writable(file)
        from tdxhw.lab.fleet_cli import run_fleet

        wish = (suites, promises, keyword, time_limit_s)
        return run_fleet(on.removeprefix("lab:"), *wish, junit=junit, report_log=report_log, as_json=as_json)
    options = runner.RunOptions(suites, on, profiles, promises, keyword, time_limit_s, junit, report_log, done)
    record = runner.run(options, SilentDisplay() if as_json else ConsoleDisplay())
    if as_json:
        click.echo(json.dumps(record.as_json(), indent=1))
    return record.exit_code


def _first_line(suite: Path) -> str:
    """Return the first line of a suite's docstring without importing it."""
    import ast

    docstring = ast.get_docstring(ast.parse(suite.read_text(encoding="utf-8")))
    if not docstring:
        raise HarnessError(f"{suite} has no docstring")
    return docstring.splitlines()[0]

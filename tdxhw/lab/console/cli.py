"""``tdxhw lab console`` and ``tdxhw lab findings``: watch a console, and look through what one said."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from tdxhw.lab import inventory
from tdxhw.lab.console import open_console
from tdxhw.lab.console.findings import Finding, scan
from tdxhw.lab.console.lines import ConsoleLine, clean, read_log
from tdxhw.lab.errors import ConsoleFailed
from tdxhw.lab.options import labs_option, ssh_config_option

_POLL_S = 0.1


@click.command("console", short_help="Show what the console of a host says.")
@click.argument("name")
@click.option("--seconds", type=click.FloatRange(min=0), help="End after so long; without it at Ctrl-C.")
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), help="Keep it in this file, too.")
@labs_option
@ssh_config_option
def console(name: str, seconds: float | None, log: Path | None, labs: Path, ssh_config: Path | None) -> None:
    """Show what the console of NAME says from now on, with times, and what of it is a kernel's complaint.

    Without a console in its lab file: the kernel log over SSH, from the last boot on. Nothing can be typed.
    """
    host = inventory.load(labs).host(name)
    capture = open_console(host, log or Path(os.devnull), labs=labs, ssh_config=ssh_config)
    assert capture is not None
    until = time.monotonic() + seconds if seconds is not None else float("inf")
    shown, reported = 0, ""
    try:
        with capture:
            while time.monotonic() < until:
                shown = _show(capture.lines, shown)
                if capture.problem != reported:
                    reported = capture.problem
                    click.echo(f"-- {reported or f'{name}: connected again'}", err=True)
                if capture.has_ended:
                    break
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        pass
    _show(capture.lines, shown)
    _summarize(scan(capture.lines))
    if capture.problem:
        raise ConsoleFailed(capture.problem)


@click.command("findings", short_help="Find a kernel's complaints in a log.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list and nothing else.")
@click.pass_context
def findings(ctx: click.Context, file: Path, *, as_json: bool) -> None:
    """Find a kernel's complaints in FILE: a log that tdxhw has kept, or any serial or kernel log.

    Exit code: 0 there are none, 1 there are some.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConsoleFailed(f"{file}: cannot read it: {error.strerror}") from error
    lines = list(read_log(data.decode("utf-8", "replace").splitlines()))
    found = scan(lines or [ConsoleLine(0.0, clean(line)) for line in data.split(b"\n")])
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        for finding in found:
            click.echo(_in_words(finding))
            for line in finding.lines:
                click.echo(f"    {line}")
        click.echo(f"{file}: {_count(found)}")
    ctx.exit(1 if found else 0)


def _show(lines: Sequence[ConsoleLine], shown: int) -> int:
    for line in lines[shown:]:
        click.echo(f"{_time(line.at)} {line.text}")
    return max(shown, len(lines))


def _summarize(found: Sequence[Finding]) -> None:
    for finding in found:
        click.echo(f"-- {_in_words(finding)}", err=True)


def _in_words(finding: Finding) -> str:
    when = f"{_time(finding.at)} " if finding.at else ""
    decoded = f" = {finding.decoded}" if finding.decoded else ""
    return f"{when}{finding.kind}: {finding.text}{decoded}"


def _count(found: Sequence[Finding]) -> str:
    kinds = [finding.kind for finding in found]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "nothing found"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S.%f")[:-3]

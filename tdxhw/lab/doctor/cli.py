"""The subcommand ``tdxhw doctor``."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdxhw.console import table_console
from tdxhw.errors import HarnessError
from tdxhw.lab.doctor.diagnosis import CHECKS, Diagnosis, Verdict, examine
from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Status
from tdxhw.lab.doctor.gather import gather
from tdxhw.lab.errors import FactsError
from tdxhw.lab.hosts import Expectation, Host
from tdxhw.lab.options import labs_option, ssh_config_option

_COLOUR: Final = {
    Status.PASS: "green",
    Status.WARN: "yellow",
    Status.FAIL: "bold red",
    Status.UNKNOWN: "magenta",
}


def summary(diagnosis: Diagnosis) -> str:
    """Return the verdict in one line, with the first thing to do."""
    order = (Status.FAIL, Status.UNKNOWN, Status.WARN, Status.PASS)
    found = [finding.status for finding in diagnosis.findings.values()]
    counts = ", ".join(f"{found.count(status)} {status.value}" for status in reversed(order) if status in found)
    match diagnosis.verdict:
        case Verdict.READY:
            return f"ready to run TDs ({counts})"
        case Verdict.COULD_NOT_TELL:
            first = _first(diagnosis, Status.UNKNOWN)
            return f"could not tell ({counts}); first: {first}"
        case Verdict.NOT_READY:
            return f"not ready ({counts}); first: {_first(diagnosis, Status.FAIL)}"


def _first(diagnosis: Diagnosis, status: Status) -> str:
    for check in CHECKS:
        finding = diagnosis.findings[check.name]
        if finding.status is status and (finding.remedy or status is not Status.UNKNOWN):
            return f"{check.title}: {finding.remedy or finding.detail}"
    return "see above"


def show(console: Console, host: str, diagnosis: Diagnosis) -> None:
    """Print every finding, and the remedy below each that needs one."""
    table = Table.grid(padding=(0, 2))
    for check in CHECKS:
        finding = diagnosis.findings[check.name]
        table.add_row(
            Text(finding.status.value, style=_COLOUR[finding.status]), Text(check.title), Text(finding.detail)
        )
        if finding.remedy:
            table.add_row("", "", Text(f"→ {finding.remedy}", style="cyan"))
    console.print(table)
    console.print(Text(f"{host}: {summary(diagnosis)}"), soft_wrap=True)


@click.command("doctor")
@click.option("--facts", type=click.Path(path_type=Path), help="Judge what --record wrote, instead of this host.")
@click.option("--on", default="local", show_default=True, metavar="local|lab:NAME|lab:all", help="Which host.")
@labs_option
@ssh_config_option
@click.option("--record", is_flag=True, help="Print what this host says about itself, unjudged, as JSON.")
@click.option("--print-gatherer", is_flag=True, help="Print the program that asks a host: ssh HOST python3 - <FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.pass_context
def doctor(
    ctx: click.Context,
    facts: Path | None,
    on: str,
    labs: Path,
    ssh_config: Path | None,
    *,
    record: bool,
    as_json: bool,
    print_gatherer: bool,
) -> None:
    """Say whether a host is ready to run TDs, and what to do for each thing that is not.

    Exit code 0: ready; 1: not ready; 2: could not tell. Of several hosts the worst: 1 before 2 before 0.
    """
    if print_gatherer:
        click.echo(_gatherer(), nl=False)
        return
    if facts is not None and (record or on != "local"):
        raise click.UsageError("--facts judges a recorded host; it makes no sense with --on and --record")
    patients = [_recorded(facts)] if facts is not None else _patients(on, labs, ssh_config)
    if record:
        for patient in patients:
            if patient.problem:
                raise FactsError(patient.problem)
            click.echo(json.dumps(json.loads(patient.record), indent=1, sort_keys=True))
        return
    verdicts = []
    documents = []
    for patient in patients:
        if patient.problem:
            verdicts.append(Verdict.COULD_NOT_TELL)
            documents.append(
                {"host": patient.name, "verdict": "could-not-tell", "problem": patient.problem, "checks": []}
            )
            if not as_json:
                click.echo(f"{patient.name}: could not tell: {patient.problem}")
            continue
        diagnosis = examine(Facts.from_json(patient.record, patient.name), patient.expects)
        verdicts.append(diagnosis.verdict)
        documents.append({"host": patient.name} | diagnosis.to_json())
        if not as_json:
            show(table_console(), patient.name, diagnosis)
    if as_json:
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1))
    worst = max(verdicts, key=(Verdict.READY, Verdict.COULD_NOT_TELL, Verdict.NOT_READY).index)
    ctx.exit(int(worst))


@dataclass(frozen=True, slots=True)
class _Patient:
    """A host that was asked, or why it could not be."""

    name: str
    record: str = ""
    problem: str = ""
    expects: Expectation = field(default_factory=Expectation)


def _recorded(path: Path) -> _Patient:
    try:
        return _Patient(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FactsError(f"{path}: cannot read it: {error}") from error


def _patients(on: str, labs: Path, ssh_config: Path | None) -> list[_Patient]:
    if on == "local":
        return [_Patient("this host", json.dumps(gather()))]
    if not on.startswith("lab:"):
        raise click.UsageError(f"--on {on}: local, lab:NAME, lab:label=LABEL or lab:all")
    from tdxhw.lab.inventory import load

    hosts = load(labs).select(on.removeprefix("lab:"))
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        return list(pool.map(lambda host: _ask(host, labs, ssh_config), hosts))


def _gatherer() -> str:
    return files("tdxhw.lab.doctor").joinpath("gather.py").read_text(encoding="utf-8")


def _ask(host: Host, labs: Path, ssh_config: Path | None) -> _Patient:
    """Send the gatherer to a lab host. It needs nothing there but a Python 3.7."""
    from tdxhw.lab.connection import Session

    try:
        with Session.open(host, labs, ssh_config=ssh_config) as session:
            record = session.check("python3 -", stdin=_gatherer().encode(), what="asking it")
    except HarnessError as error:
        return _Patient(host.name, problem=str(error))
    return _Patient(host.name, record, expects=host.expects)

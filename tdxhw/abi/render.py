"""Show reports: a table and a summary line each, or JSON."""

from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdxhw.abi.check import Check, Report, Status, Verdict
from tdxhw.abi.compare import Agreement, Compared, Difference
from tdxhw.abi.layout import Field

_COLOUR: Final = {
    Status.OK: "green",
    Status.NOTE: "cyan",
    Status.OFF: "bold red",
    Status.DIFFERS: "bold red",
    Status.UNKNOWN: "magenta",
}
_PLAIN_WIDTH: Final = 200  # a pipe has no width; wrapping would break grep


def console() -> Console:
    """Return a console that does not wrap what goes into a pipe."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH, soft_wrap=True, no_color=True)


def show(screen: Console, report: Report) -> None:
    """Print where everything is from and every check, with what to do; the summary is not part of it."""
    screen.print(Text(f"{report.release}, build id {report.build_id or 'none'}", style="bold"))
    for what, where in (("configuration", report.config_from), ("structures", report.types_from)):
        screen.print(Text(f"  {what} from {where or 'nowhere'}"))
    table = Table.grid(padding=(0, 2))
    for check in report.checks():
        table.add_row(Text(check.status.value, style=_COLOUR[check.status]), Text(check.what), Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", style="cyan"))
    screen.print(table)


def summary(report: Report) -> str:
    """Return the verdict on one kernel in one line."""
    first, *others = report.given
    who = f"{report.release} ({first}{f' and {len(others)} more' if others else ''})"
    match report.verdict:
        case Verdict.FITS:
            agreeing = sum(one.agreement is Agreement.AGREES and not one.values for one in report.compared)
            return f"{who}: can run TDs, dialect {report.dialect}; {agreeing} structures agree, by {report.types_from}"
        case Verdict.DOES_NOT:
            wrong = _of(report, Status.OFF, Status.DIFFERS)
            return f"{who}: {_why_not(wrong)}; first: {_first(wrong)}"
        case Verdict.CANNOT_TELL:
            return f"{who}: cannot tell; first: {_first(_of(report, Status.UNKNOWN))}"


def _of(report: Report, *wanted: Status) -> list[Check]:
    return [check for check in report.checks() if check.status in wanted]


def _why_not(wrong: list[Check]) -> str:
    off = any(check.status is Status.OFF for check in wrong)
    differences = sum(check.status is Status.DIFFERS for check in wrong)
    said = ["built without TDX"] if off else []
    if differences:
        said.append(f"{differences} difference{'s' if differences > 1 else ''} from the binding")
    return " and ".join(said)


def _first(checks: list[Check]) -> str:
    return f"{checks[0].what}: {checks[0].detail}"


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "release": report.release,
        "given": report.given,
        "build_id": report.build_id,
        "verdict": {Verdict.FITS: "fits", Verdict.DOES_NOT: "does-not", Verdict.CANNOT_TELL: "cannot-tell"}[
            report.verdict
        ],
        "summary": summary(report),
        "dialect": report.dialect,
        "config_from": report.config_from,
        "types_from": report.types_from,
        "configuration": [_check(check) for check in report.configuration],
        "parameter": [_check(check) for check in report.parameter],
        "layout": [_check(check) for check in report.layout],
        "structures": [_structure(one) for one in report.compared],
    }


def _check(check: Check) -> dict[str, str]:
    made = {"status": check.status.value, "what": check.what, "detail": check.detail}
    return made | {"remedy": check.remedy} if check.remedy else made


def _structure(one: Compared) -> dict[str, Any]:
    return {
        "name": one.name,
        "agreement": one.agreement.value,
        "size": one.size,
        "differences": [_difference(difference) for difference in one.differences],
        "newer": [_difference(difference) for difference in one.newer],
    }


def _difference(one: Difference) -> dict[str, Any]:
    return {"path": one.path, "kernel": _field(one.kernel), "binding": _field(one.binding), "text": str(one)}


def _field(where: Field | int | None) -> dict[str, int] | None:
    if isinstance(where, int):
        return {"value": where}
    return None if where is None else {"offset": where.offset, "size": where.size}

"""The subcommand ``tdxhw validate``."""

import json
import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from tdxhw.errors import HarnessError
from tdxhw.lab.options import labs_option, ssh_config_option
from tdxhw.validate.errors import CannotValidate

if TYPE_CHECKING:
    from tdxhw.report.results import Results
    from tdxhw.validate.outcome import Outcome
    from tdxhw.validate.validation import Plan

INCONCLUSIVE: Final = CannotValidate.exit_code
"""Also for what could not be done at all: `git bisect run` then skips the revision instead of blaming it."""


class _UsageError(click.UsageError):
    """A mistake on the command line, with the exit code of this command."""

    exit_code = INCONCLUSIVE


class _Command(click.Command):
    """A command whose mistakes on the command line are inconclusive, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _UsageError(error.format_message(), error.ctx) from error


@click.command(cls=_Command, short_help="Try a kernel build on a lab host, and say whether it is good.")
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option("--lab", "name", required=True, metavar="NAME", help="The lab host.")
@click.option(
    "--kernel", "kernel", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="A .deb (repeat for a split kernel), or one bzImage.",
)  # fmt: skip
@click.option("--modules", default="", metavar="TAR|none", help="The modules of a bzImage, as a tar archive.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="RESULTS", help="What `tdxhw run --report-log` wrote.",
)  # fmt: skip
@click.option(
    "--parameters", multiple=True, metavar="M.P=V,V", help="One boot for each value: kvm_intel.tdx=Y,N. Repeatable.",
)  # fmt: skip
@click.option("--command-line", default="", metavar="TEXT", help="More for the kernel's command line.")
@click.option("--retries", type=click.IntRange(0, 20), default=2, show_default=True, metavar="N",
              help="Run what fails again before it is called a regression.")  # fmt: skip
@click.option("--boot-limit", type=click.FloatRange(10, 7200), default=300.0, show_default=True, metavar="S",
              help="How long a boot may take, firmware included [s].")  # fmt: skip
@click.option("-k", "keyword", default="", metavar="EXPR", help="Only tests whose names match, as in pytest.")
@click.option("--promise", "promises", multiple=True, metavar="CAPABILITY", help="Fail without it, do not skip.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
              metavar="S", help="For each test [s].")  # fmt: skip
@click.option("--history", metavar="FILE|URL", help="Where results are kept [$TDXHW_HISTORY, else the user's own].")
@click.option("--no-history", is_flag=True, help="Keep them nowhere.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="For results, console log and progress [validate-HOST-TIME].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else.")
@click.option("--recover", is_flag=True, help="Only roll back what a validation left on the host.")
@labs_option
@ssh_config_option
def validate(
    suites: tuple[str, ...],
    name: str,
    kernel: tuple[Path, ...],
    modules: str,
    baseline: Path | None,
    parameters: tuple[str, ...],
    command_line: str,
    retries: int,
    boot_limit: float,
    keyword: str,
    promises: tuple[str, ...],
    time_limit: float,
    history: str | None,
    no_history: bool,
    out: Path | None,
    as_json: bool,
    recover: bool,
    labs: Path,
    ssh_config: Path | None,
) -> int:
    """Install a kernel, boot it once, prove that it runs, run suites, compare, roll back, and say one line.

    Exit code: 0 GOOD, 1 REGRESSED, 125 INCONCLUSIVE (also if it could not be done), 130 interrupted.
    """
    with _inconclusive():
        from tdxhw.lab.archive import build
        from tdxhw.lab.host_run import Wish
        from tdxhw.lab.inventory import load
        from tdxhw.validate.candidate import read_candidate
        from tdxhw.validate.recovery import recover as roll_back
        from tdxhw.validate.surroundings import LabSurroundings
        from tdxhw.validate.validation import Plan, Validation

        def say(text: str) -> None:
            echo(f"{datetime.now().astimezone():%H:%M:%S} {text}", err=as_json)

        host = load(labs).host(name)
        if recover:
            problems = roll_back(name, LabSurroundings(host, labs, ssh_config, boot_limit), boot_limit, say)
            for problem in problems:
                echo(f"tdxhw: {problem}", err=True)
            return INCONCLUSIVE if problems else 0
        if not kernel or baseline is None:
            raise HarnessError("--kernel and --baseline say what to validate, and against what")
        words = check_wishes(suites, keyword, promises, parameters, command_line)
        candidate = read_candidate(kernel, modules)
        base = read_baseline(baseline, suites, name)
        out = _made(out) if out is not None else _new_folder(name)
        token = secrets.token_hex(6)
        plan = Plan(name, candidate, base, words, out, token, boot_limit, retries, command_line=command_line,
                    narrowed=bool(keyword))  # fmt: skip
        wish = Wish(suites, promises, keyword, time_limit)
        around = LabSurroundings(
            host, labs, ssh_config, boot_limit, out, build(), wish, retries, token, say
        )  # fmt: skip
        outcome = Validation(plan, around, say).run()
        document = json.dumps(outcome.as_json(), indent=1)
        try:
            (out / "outcome.json").write_text(document, encoding="utf-8")
        except OSError as error:
            echo(f"tdxhw: {out / 'outcome.json'}: cannot write it: {error.strerror}", err=True)
        if not no_history:
            remember(plan, outcome, history)
        if as_json:
            echo(document)
        else:
            _show(outcome)
    return outcome.exit_code


@contextmanager
def _inconclusive() -> Iterator[None]:
    """Turn whatever could not be done into one line and `INCONCLUSIVE`: a traceback's exit code would be a verdict."""
    try:
        yield
    except HarnessError as error:
        raise CannotValidate(str(error)) from error
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except OSError as error:
        raise CannotValidate(f"{error.filename or 'error'}: {error.strerror or error}") from error
    except Exception as error:
        traceback.print_exc()
        raise CannotValidate(f"internal error: {type(error).__name__}: {error}: please report this") from error


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line. Nobody there to read it, or a closed terminal, is no reason to leave a host as it is."""
    try:
        click.echo(text, err=err)
    except OSError:
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"{out}: {error.strerror}") from error
    if any(out.iterdir()):
        raise HarnessError(f"{out}: is not empty: --out names a new folder, so that nothing is overwritten")
    return out


def _new_folder(host: str) -> Path:
    """Make a folder of our own, also if another validation of this host begins in the same second."""
    name = f"validate-{host}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        out = Path(f"{name}-{number}" if number > 1 else name)
        try:
            out.mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise HarnessError(f"{out}: {error.strerror}") from error
        else:
            return out


def check_wishes(
    suites: Sequence[str], keyword: str, promises: Sequence[str], parameters: Sequence[str], command_line: str
) -> list[dict[str, str]]:
    """Refuse what there is not, and what no boot loader could pass on; return the matrix of parameters."""
    from tdxhw.capabilities import parse_capability
    from tdxhw.lab.selection import check_selection
    from tdxhw.validate import matrix

    check_selection(suites, keyword)
    for promise in promises:
        parse_capability(promise)
    # What means something to GRUB's shell would end in its configuration.
    if any(not (char.isalnum() or char in " _.,:=+/@%-") for char in command_line):
        raise HarnessError("--command-line: letters, digits, spaces and _.,:=+/@%- only")
    return matrix.parse(parameters)


def read_baseline(path: Path, suites: Sequence[str], host: str) -> "Results":
    """Return what a baseline says about the suites. ``HarnessError`` if no verdict can ever come of it."""
    from tdxhw.report.read import read
    from tdxhw.runner import resolve
    from tdxhw.validate.suites import of_suites
    from tdxhw.validate.verdict import why_useless

    base = of_suites(read(path), resolve(suites)) if suites else read(path)
    if useless := why_useless(base):
        of = f" of {' '.join(suites)}" * bool(suites)
        raise HarnessError(
            f"{path}: {useless}{of}: `tdxhw run --on lab:{host} --report-log {path}` under a good kernel makes one"
        )
    return base


def remember(plan: "Plan", outcome: "Outcome", where: str | None) -> None:
    """Keep the results. A history that cannot be written costs no verdict."""
    if not outcome.results.results:
        return
    try:
        from tdxhw.history.cli import open_history
        from tdxhw.history.store import RunRecord

        with open_history(where, create=True) as history:
            record = RunRecord("validate", verdict=outcome.verdict.name, line=outcome.line)
            history.add(record, outcome.results)
    except Exception as error:  # noqa: BLE001  (whatever it is: the verdict is there)
        echo(f"tdxhw: {plan.out}: not in the history: {error}", err=True)


def _show(outcome: "Outcome") -> None:
    echo()
    for tried, judgement in outcome.judgements:
        if tried.parameters:
            echo(" ".join(f"{key}={value}" for key, value in tried.parameters.items()) + ":")
        for reason in judgement.reasons:
            echo(f"  {reason}")
    for difference in outcome.differences:
        echo(f"  {outcome.host}: {difference}")
    echo(outcome.line)

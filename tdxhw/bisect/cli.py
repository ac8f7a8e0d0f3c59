"""The subcommand ``tdxhw bisect``."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from tdxhw.bisect import plan as plans
from tdxhw.bisect.errors import BisectError
from tdxhw.bisect.session import Found
from tdxhw.bisect.session import bisect as run_bisection
from tdxhw.cli import EXIT_CANNOT_RUN, EXIT_INTERRUPTED
from tdxhw.lab.options import labs_option, ssh_config_option
from tdxhw.validate.cli import check_wishes, echo, read_baseline
from tdxhw.validate.cli import validate as validate_command

_TDXHW: Final = (sys.executable, "-P", "-c", "import sys; from tdxhw.cli import main; sys.exit(main(sys.argv[1:]))")


@click.command("bisect", short_help="Find the commit that broke a kernel.")
@click.option("--good", required=True, metavar="REV", help="A commit whose kernel is good.")
@click.option("--bad", required=True, metavar="REV", help="A later one whose kernel is not.")
@click.option("--lab", required=True, metavar="NAME", help="The lab machine.")
@click.option(
    "--baseline", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="RESULTS",
    help="Results of a good kernel on that machine.",
)  # fmt: skip
@click.option("--build", required=True, metavar="COMMAND", help="Build the kernel; a shell command, run in the tree.")
@click.option(
    "--kernel", default=plans.DEFAULT_KERNEL, show_default=True, metavar="FILE",
    help="What the build makes, seen from the tree; may be a pattern.",
)  # fmt: skip
@click.option(
    "--tree", type=click.Path(path_type=Path, file_okay=False), default=Path(), metavar="DIR",
    help="The kernel's git tree. [here]",
)  # fmt: skip
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where the logs go. [tdxhw-bisect-GOOD-BAD]",
)  # fmt: skip
@click.option(
    "--give-up-after", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
    help="Validations in a row without a verdict, or builds of which none succeeds.",
)  # fmt: skip
@labs_option
@ssh_config_option
@click.argument("validate_options", nargs=-1, metavar="[-- VALIDATE-OPTION]...")
@click.pass_context
def bisect(
    ctx: click.Context,
    good: str,
    bad: str,
    lab: str,
    baseline: Path,
    build: str,
    kernel: str,
    tree: Path,
    keep: Path | None,
    give_up_after: int,
    labs: Path,
    ssh_config: Path | None,
    validate_options: tuple[str, ...],
) -> None:
    """Find the commit between --good and --bad that broke the kernel: `git bisect run` over `tdxhw validate`.

    A commit that does not build is skipped. The tree is as it was afterwards, also after Ctrl-C.

    Exit code: 0 found, 1 not a single commit (those between came to no verdict), 2 could not be done, 130 interrupted.
    """
    validate = [*_TDXHW, "validate", "--lab", lab, "--labs", str(labs), "--baseline", str(baseline)]
    validate += ["--ssh-config", str(ssh_config)] if ssh_config is not None else []
    keep = keep or Path(f"tdxhw-bisect-{good}-{bad}".replace("/", "_"))
    plan = plans.make(
        tree, good, bad, build=build, kernel=kernel, validate=[*validate, *validate_options], cwd=Path.cwd(), keep=keep,
        give_up_after=give_up_after,
    )  # fmt: skip
    _check_validation(plan.validate[len(_TDXHW) + 1 :], baseline, lab)
    _check_lab(labs, lab, ssh_config)
    found = run_bisection(plan, echo)
    _show(found)
    if found.not_reset:
        raise BisectError(
            f"{plan.tree} is not as it was ({found.not_reset}): git -C {shlex.quote(plan.tree)} bisect reset"
        )
    if found.interrupted:
        ctx.exit(EXIT_INTERRUPTED)
    if found.problem:
        echo(f"tdxhw: {found.problem}", err=True)
        ctx.exit(EXIT_CANNOT_RUN)
    ctx.exit(0 if len(found.commits) == 1 else 1)


def _check_validation(arguments: Sequence[str], baseline: Path, lab: str) -> None:
    """Find out now, not after the first build, what the validation would say of its options."""
    try:
        wishes = validate_command.make_context("tdxhw validate", list(arguments)).params
    except click.UsageError as error:
        raise BisectError(f"-- {error.format_message()} (see `tdxhw validate --help`)") from error
    if wishes["recover"] or wishes["kernel"]:
        raise BisectError("-- takes options for a validation; --kernel belongs before it, and --recover is none")
    suites = wishes["suites"]
    check_wishes(suites, wishes["keyword"], wishes["promises"], wishes["parameters"], wishes["command_line"])
    read_baseline(baseline, suites, lab)


def _check_lab(labs: Path, lab: str, ssh_config: Path | None) -> None:
    """Find out now whether the lab machine answers."""
    from tdxhw.lab.connection import Session
    from tdxhw.lab.inventory import load

    with Session.open(load(labs).host(lab), labs, ssh_config=ssh_config) as session:
        session.check("true")


def _show(found: Found) -> None:
    echo()
    for step in found.steps:
        echo(f"{step.outcome:<13} {step.commit[:12]} {step.subject}")
        if step.outcome != "good":
            echo(f"              {step.line}")
    if len(found.commits) == 1:
        commit, subject = found.commits[0]
        echo(f"first bad commit: {commit} {subject}")
    elif found.commits:
        echo("the first bad commit is one of these; those between came to no verdict:")
        for commit, subject in found.commits:
            echo(f"  {commit} {subject}")
    echo(f"logs: {found.log.parent}; git bisect replay {found.log.name} goes on from there")

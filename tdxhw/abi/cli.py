"""The subcommand ``tdxhw abi``."""

import json
import tempfile
from pathlib import Path

import click

from tdxhw.abi.check import Report, Verdict, check
from tdxhw.abi.collect import collect
from tdxhw.abi.errors import AbiError
from tdxhw.abi.render import as_json as report_as_json
from tdxhw.abi.render import console, show, summary


@click.command("abi")
@click.argument("kernels", nargs=-1, required=True, metavar="KERNEL…")
@click.option(
    "--types", type=click.Choice(["auto", "btf", "dwarf"]), default="auto", show_default=True,
    help="Where structures come from: BTF, DWARF, or BTF and DWARF where there is none.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.pass_context
def abi(ctx: click.Context, kernels: tuple[str, ...], types: str, *, as_json: bool) -> None:
    """Say whether a kernel build can run TDs and whether its structures are those that tdxhw speaks. Boots nothing.

    A KERNEL is a Debian package, a bzImage, a vmlinux, a module, a folder (a build tree, an unpacked root), or
    `running`. Packages of one kernel that was split into several are given together.

    Exit code 0: every kernel can, and fits; 1: one cannot, or differs; 2: cannot tell, or not readable.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="tdxhw-abi-") as work:
            reports = [check(kernel, types) for kernel in collect(kernels, Path(work))]
    except OSError as error:  # a full disk, a folder that only root may look into
        where = f"{error.filename}: " if error.filename else ""
        raise AbiError(
            f"{where}{error.strerror or error}{' (as root?)' if isinstance(error, PermissionError) else ''}"
        ) from None
    if as_json:
        click.echo(json.dumps([report_as_json(report) for report in reports], indent=1))
    else:
        _show(reports)
    found = {report.verdict for report in reports}
    worst = next(one for one in (Verdict.DOES_NOT, Verdict.CANNOT_TELL, Verdict.FITS) if one in found)
    ctx.exit(worst.value)


def _show(reports: list[Report]) -> None:
    screen = console()
    for report in reports:
        show(screen, report)
        click.echo()
    for report in reports:
        click.echo(summary(report))

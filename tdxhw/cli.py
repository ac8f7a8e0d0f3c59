"""The command line. Each subcommand lives in a file of its own and is imported only when it is called.

Exit codes: 0 all good, 1 a test failed, 2 the run could not be done (one line, no traceback), 130 interrupted.
"""

import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import click

import tdxhw
from tdxhw.errors import HarnessError, UnknownName
from uapi_ctypes.errors import KvmError

EXIT_CANNOT_RUN: Final = 2
EXIT_INTERRUPTED: Final = 130

_OUTPUT_FAILED: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What writing to standard output, or to a file of ours, may run into at any time."""

SUBCOMMANDS: Final = {
    # name: (module:attribute, what `tdxhw --help` says without importing it)
    "run": ("tdxhw.commands.run:run", "Run suites on a real or a simulated /dev/kvm."),
    "decode": ("tdxhw.commands.decode:decode", "Say what a SEAMCALL or TDCALL status means."),
    "replay": ("tdxhw.commands.replay:replay", "Play recordings of real hardware on the simulator."),
    "diff": ("tdxhw.commands.diff:diff", "Run suites on two kernels and compare every call."),
    "measure": ("tdxhw.commands.measure:measure", "Predict the MRTD of a TDVF firmware image."),
    "doctor": ("tdxhw.lab.doctor.cli:doctor", "Say whether this host is ready to run TDs."),
    "lab": ("tdxhw.lab.cli:lab", "Show and check the lab's hosts."),
    "abi": ("tdxhw.abi.cli:abi", "Say whether a kernel build can run TDs, without booting it."),
    "validate": ("tdxhw.validate.cli:validate", "Try a kernel build on a lab host, and say whether it is good."),
    "bisect": ("tdxhw.bisect.cli:bisect", "Find the commit that broke a kernel, with validations on a lab host."),
    "compare": ("tdxhw.report.cli:compare", "Say what became better, worse and flaky between two runs."),
    "report": ("tdxhw.report.cli:report", "Turn results into JUnit, KTAP, TAP, KCIDB, HTML and more."),
    "history": ("tdxhw.history.cli:history", "Keep the results of all runs, and ask about them."),
}
"""A further subcommand is one line here and a click command somewhere."""


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, so that the others cost nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Return the names in the order of `SUBCOMMANDS`, which is the order of a first day's work."""
        return list(SUBCOMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand that was typed, or raise `UnknownName` with the one that was meant."""
        if args[0] not in SUBCOMMANDS and not args[0].startswith("-"):
            raise UnknownName("command", args[0], SUBCOMMANDS)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return the subcommand, or None when there is none of that name."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module, _, attribute = SUBCOMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of subcommands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tdxhw.__version__, prog_name="tdxhw")
def cli() -> None:
    """Drive real KVM TDX hosts, and simulate them where there is none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Never raises, never shows a traceback for a user's mistake.

    A mistake of ours is shown with its traceback and is 2 as well: Python's own 1 would say that a test failed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no locale is a reason to lose a result
    try:
        code = cli.main(args=argv, prog_name="tdxhw", standalone_mode=False)
    except HarnessError as error:
        click.echo(f"tdxhw: {error}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_CANNOT_RUN
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else "tdxhw"
        click.echo(f"tdxhw: {error.format_message()} (see `{context} --help`)", err=True)
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"tdxhw: {error.format_message()}", err=True)
        return EXIT_CANNOT_RUN
    except (click.Abort, KeyboardInterrupt):
        click.echo("tdxhw: interrupted", err=True)
        return EXIT_INTERRUPTED
    except SystemExit:  # `tdxhw ... | head`: click and rich would end with 1
        return EXIT_CANNOT_RUN
    except Exception as error:  # noqa: BLE001
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Say what ended the command although nobody made a mistake on the command line."""
    if isinstance(error, OSError) and not isinstance(error, KvmError) and error.errno in _OUTPUT_FAILED:
        line = f"{error.filename or 'the output'}: cannot write it: {error.strerror}"
        with suppress(OSError, ValueError):  # what is left of it is not tried again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        traceback.print_exception(error)
        line = f"internal error: {type(error).__name__}: {error}: please report this"
    with suppress(OSError):
        click.echo(f"tdxhw: {line}", err=True)
    return EXIT_CANNOT_RUN

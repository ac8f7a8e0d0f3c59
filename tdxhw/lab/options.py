"""Options that several subcommands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tdxhw.lab.hosts import DEFAULT_FOLDER

_Command = TypeVar("_Command", bound=Callable[..., Any])


def labs_option(command: _Command) -> _Command:
    """Add ``--labs DIR``."""
    return click.option(
        "--labs",
        type=click.Path(path_type=Path),
        default=DEFAULT_FOLDER,
        envvar="TDXHW_LABS",
        show_default=True,
        show_envvar=True,
        help="Folder with the lab files.",
    )(command)


def ssh_config_option(command: _Command) -> _Command:
    """Add ``--ssh-config FILE``."""
    return click.option(
        "--ssh-config",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        envvar="TDXHW_SSH_CONFIG",
        show_envvar=True,
        help="Use this instead of ~/.ssh/config.",
    )(command)

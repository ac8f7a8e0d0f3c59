"""``tdxhw lab status``: which hosts answer, and who has them."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from tdxhw.console import table_console
from tdxhw.errors import HarnessError
from tdxhw.lab import inventory
from tdxhw.lab.connection import Session
from tdxhw.lab.hosts import Host
from tdxhw.lab.labgrid_place import LabgridPlace
from tdxhw.lab.lease import holder_of


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What a host answered, or why it did not."""

    host: str
    kernel: str = ""
    holder: str = ""
    problem: str = ""

    @property
    def is_free(self) -> bool:
        """Whether a run could start there now."""
        return not self.problem and not self.holder

    def __str__(self) -> str:
        """``free``, who has it, or what is in the way."""
        return self.problem or (f"taken by {self.holder}" if self.holder else "free")


def ask(host: Host, labs: Path, ssh_config: Path | None) -> HostStatus:
    """Ask one host. Never raises: `problem` says what is in the way."""
    try:
        with Session.open(host, labs, ssh_config=ssh_config) as session:
            holder = LabgridPlace(host).holder() if host.lease else str(holder_of(session) or "")
            return HostStatus(host.name, session.check("uname -r").strip(), holder)
    except HarnessError as error:
        return HostStatus(host.name, problem=str(error))


def ask_all(hosts: Sequence[Host], one: Callable[[Host], HostStatus]) -> list[HostStatus]:
    """Ask all of them at once: one that does not answer holds up nobody."""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        return list(pool.map(one, hosts))


def show_status(expression: str, labs: Path, ssh_config: Path | None, *, as_json: bool) -> int:
    """Show the hosts that `expression` means. Return 0 if all are free, else 1."""
    hosts = inventory.load(labs).select(expression)
    answers = ask_all(hosts, lambda host: ask(host, labs, ssh_config))
    if as_json:
        click.echo(json.dumps([asdict(answer) | {"free": answer.is_free} for answer in answers], indent=1))
    else:
        table = Table("host", "kernel", "", box=None, pad_edge=False)
        for answer in answers:
            table.add_row(Text(answer.host), Text(answer.kernel or "-"), Text(str(answer)))
        table_console().print(table)
    return 0 if all(answer.is_free for answer in answers) else 1

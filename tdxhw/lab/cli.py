"""The subcommand ``tdxhw lab``: what hosts there are, and whether their files are right."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.table import Table
from rich.text import Text

from tdxhw.console import table_console
from tdxhw.lab import inventory
from tdxhw.lab.console.cli import console, findings
from tdxhw.lab.errors import HostKeyRefused, InventoryError
from tdxhw.lab.hosts import Host
from tdxhw.lab.options import labs_option, ssh_config_option
from tdxhw.lab.power.cli import power

_Command = TypeVar("_Command", bound=Callable[..., Any])

_NEW_HOST: Final = """\
# No secrets here: ssh takes keys, jump hosts and known hosts from its own configuration; a BMC's USER:PASSWORD is in
# the environment variable that credentials_env names. Power: redfish, ipmi, command; console: ipmi-sol, command.
host:
  name: {name}
  ssh: {ssh}
  promises: [kvm]            # with TDX on: [kvm, tdx]. Promised and then missing fails the run.
  labels: []                 # hosts with equal labels share a run: --on lab:label=LABEL
  # limits: {{memory_gib: 64, run_timeout_s: 3600, test_timeout_s: 120, tds: 16}}
  # expects: {{kernel: "6.*", module: 1.5.16}}
  # power: {{driver: redfish, url: "https://bmc-{host}", credentials_env: BMC_USER_AND_PASSWORD}}
  # console: {{driver: ipmi-sol, address: bmc-{host}}}
"""


def _json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)


def _as_json(host: Host) -> dict[str, Any]:
    return asdict(host) | {"ssh": str(host.ssh)}


@click.group("lab")
def lab() -> None:
    """Show and check the lab's hosts."""


lab.add_command(power)
lab.add_command(console)
lab.add_command(findings)


@lab.command("list")
@labs_option
@_json_option
@click.option("--ansible", is_flag=True, help="Print an Ansible inventory: hosts, and a group for each label.")
@click.argument("expression", required=False, metavar="[NAME,NAME…|all|label=LABEL]")
def list_(expression: str | None, labs: Path, *, as_json: bool, ansible: bool) -> None:
    """List the hosts, or those that `--on lab:…` would mean."""
    known = inventory.load(labs)
    hosts = known.select(expression) if expression else tuple(known.hosts.values())
    if ansible:
        click.echo(json.dumps(_ansible_inventory(list(hosts), labs), indent=1))
        return
    if as_json:
        click.echo(json.dumps([_as_json(host) for host in hosts], indent=1))
        return
    table = Table("host", "ssh", "promises", "labels", "power", "console", box=None, pad_edge=False)
    for host in hosts:
        power, console = (driver.driver if driver else "-" for driver in (host.power, host.console))
        cells = (host.name, str(host.ssh), " ".join(host.promises), " ".join(host.labels), power, console)
        table.add_row(*(Text(cell or "-", overflow="fold") for cell in cells))
    table_console().print(table)


def _ansible_inventory(hosts: list[Host], labs: Path) -> dict[str, Any]:
    """Return what Ansible wants of an inventory script. Host keys are checked there as they are here."""
    variables: dict[str, dict[str, Any]] = {}
    labels: dict[str, list[str]] = {}
    known = (labs / "known_hosts").absolute()
    for host in hosts:
        target = {"ansible_host": host.ssh.host, "ansible_user": host.ssh.user, "ansible_port": host.ssh.port}
        variables[host.name] = {key: value for key, value in target.items() if value is not None}
        for label in host.labels:
            labels.setdefault(re.sub(r"[^a-z0-9_]", "_", f"label_{label}"), []).append(host.name)
    ssh = f'-o StrictHostKeyChecking=yes -o UserKnownHostsFile="{known} ~/.ssh/known_hosts"'
    return {
        "_meta": {"hostvars": variables},
        "all": {"hosts": [host.name for host in hosts], "vars": {"ansible_ssh_common_args": ssh}},
    } | {group: {"hosts": members} for group, members in labels.items()}


@lab.command("archive", short_help="Pack tdxhw for a host without internet.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write it; the cache if not given."
)
def archive(folder: Path | None) -> None:
    """Pack tdxhw and what it needs for a host without internet; print the file's name.

    Unpack it into a folder of its own: `python3 FOLDER` is then the tdxhw command.
    """
    from tdxhw.lab.archive import build

    packed = build()
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tdxhw"
    path = folder / f"tdxhw-{packed.digest}.tar.gz"
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(packed.data)
            partial.replace(path)
        except OSError as error:
            raise InventoryError(f"{path}: cannot write it: {error.strerror}") from error
    click.echo(path)


@lab.command("show")
@click.argument("name")
@labs_option
@_json_option
def show(name: str, labs: Path, *, as_json: bool) -> None:
    """Show everything that is known about host NAME."""
    document = _as_json(inventory.load(labs).host(name))
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    for key, value in document.items():
        click.echo(f"{key:10} {_in_words(value)}")


def _in_words(value: object) -> str:
    match value:
        case dict():
            return ", ".join(f"{key}={_in_words(item)}" for key, item in value.items() if item not in (None, {})) or "-"
        case tuple() | list():
            return " ".join(str(item) for item in value) or "-"
        case None:
            return "-"
        case _:
            return str(value)


@lab.command("check", short_help="Check every lab file.")
@labs_option
def check(labs: Path) -> None:
    """Check every lab file; the first thing wrong is shown with its file and line."""
    hosts = inventory.load(labs).hosts
    click.echo(f"{labs}: {len(hosts)} host{'' if len(hosts) == 1 else 's'}, all files right")


@lab.command("status")
@click.argument("expression", default="all", metavar="[NAME,NAME…|all|label=LABEL]")
@labs_option
@ssh_config_option
@_json_option
@click.pass_context
def status(ctx: click.Context, expression: str, labs: Path, ssh_config: Path | None, *, as_json: bool) -> None:
    """Show which hosts answer, and who has them.

    Exit code: 0 all are free, 1 one is taken or does not answer, 2 nobody could be asked.
    """
    from tdxhw.lab.status import show_status

    ctx.exit(show_status(expression, labs, ssh_config, as_json=as_json))


@lab.command("trust", short_help="Show the host key of a host, and record it.")
@click.argument("name")
@click.option("--fingerprint", metavar="SHA256:...", help="Record the key only if it is this one; asks nothing.")
@click.option("--replace", is_flag=True, help="Record it although another key is known.")
@labs_option
@ssh_config_option
def trust(name: str, fingerprint: str | None, labs: Path, ssh_config: Path | None, *, replace: bool) -> None:
    """Show the host key of NAME and, if you say that it is right, record it in the labs folder."""
    from tdxhw.lab.connection import probe_key  # first: it says what to install
    from tdxhw.lab import host_keys  # isort: skip

    host = inventory.load(labs).host(name)
    known_name, key, expected = probe_key(host, labs, ssh_config=ssh_config)
    shown = host_keys.fingerprint(key)
    click.echo(f"{known_name} shows {shown}")
    if expected is not None:
        click.echo(f"known is   {host_keys.fingerprint(expected)}")
        if not replace:
            raise HostKeyRefused(f"{name}: its key has changed; after making sure that it is right: --replace")
    if fingerprint is not None:
        if shown.split(" ")[1] != fingerprint:
            raise HostKeyRefused(f"{name}: its key is not {fingerprint}: nothing was recorded")
    else:
        _ask_whether_right(name)
    click.echo(f"recorded in {host_keys.record(labs, known_name, key, replace=replace)}")


def _ask_whether_right(name: str) -> None:
    try:
        if click.confirm("Is that its key? (On the host: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub)"):
            return
    except click.Abort:  # nobody to ask
        click.echo()
    raise HostKeyRefused(f"{name}: nobody said that the key is right: nothing was recorded (--fingerprint says it)")


def _quoted(name: str) -> str:
    """Return it as text in YAML, where `123` and `no` are something else."""
    import yaml

    return name if isinstance(yaml.safe_load(name), str) else json.dumps(name)


@lab.command("init")
@click.argument("name")
@click.option("--ssh", default=None, help="Where ssh goes; the host's name if not given.")
@labs_option
def init(name: str, ssh: str | None, labs: Path) -> None:
    """Write a lab file for host NAME to start from."""
    inventory.check_name(name)
    path = labs / f"{name}.yaml"
    if labs.is_dir() and name in (known := inventory.load(labs).hosts):
        raise InventoryError(f"host {name!r} is already at {known[name].place}")
    labs.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_NEW_HOST.format(name=_quoted(name), host=name, ssh=json.dumps(ssh or name)))
    except FileExistsError:
        raise InventoryError(f"{path} is already there") from None
    try:
        inventory.load_file(path)
    except InventoryError:
        path.unlink()
        raise
    click.echo(f"{path}: edit it, then `tdxhw lab check`")

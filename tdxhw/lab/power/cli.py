"""``tdxhw lab power``: press a lab host's buttons by hand."""

import time
from pathlib import Path
from typing import Final

import click

from tdxhw.lab import inventory
from tdxhw.lab.errors import LeaseHeld, PowerFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.options import labs_option, ssh_config_option
from tdxhw.lab.power import open_power

_DISTURBS: Final = ("off", "reset")


@click.command("power")
@click.argument("name")
@click.argument("button", type=click.Choice(["on", "off", "reset", "status"]))
@click.option("--anyway", is_flag=True, help="Off and reset: although somebody else has the host.")
@labs_option
@ssh_config_option
def power(name: str, button: str, labs: Path, ssh_config: Path | None, *, anyway: bool) -> None:
    """Switch the power of NAME, or tell whether it is on. All of it is hard: no shutdown.

    Returns once it is done. What is on stays on, what is off stays off.
    """
    host = inventory.load(labs).host(name)
    switch = open_power(host)
    if switch is None:
        raise PowerFailed(f"{name} has no power: in its lab file ({host.place})")
    if button in _DISTURBS and not anyway:
        _ask_who_has_it(host, labs, ssh_config)
    started = time.monotonic()
    match button:
        case "on":
            switch.on()
        case "off":
            switch.off()
        case "reset":
            switch.reset()
        case _:
            click.echo(f"{name}: {'on' if switch.is_on() else 'off'} ({switch.name})")
            return
    done = "reset" if button == "reset" else f"is {button}"
    click.echo(f"{name}: {done} ({switch.name}, {time.monotonic() - started:.1f} s)")


def _ask_who_has_it(host: Host, labs: Path, ssh_config: Path | None) -> None:
    from tdxhw.lab.status import ask

    answer = ask(host, labs, ssh_config)
    if answer.holder:
        raise LeaseHeld(f"{host.name} is taken by {answer.holder}; --anyway does it all the same")
    if answer.problem:  # mostly the very reason for being here
        click.echo(f"{answer.problem}; nobody could be asked who has it", err=True)

"""A lab host's power switch: Redfish, IPMI, or commands of yours, as its lab file says."""

import os
from collections.abc import Mapping
from typing import Protocol

from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import PowerFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.power.switch import AwaitedPower, Switch

__all__ = ["Power", "PowerFailed", "open_power"]


class Power(Protocol):
    """Switches one machine. Every call is limited in time; ``PowerFailed`` says in one line what is in the way."""

    name: str
    """``redfish https://bmc-1``, ``ipmi bmc-1``, ``command``."""

    def is_on(self) -> bool:
        """Return whether the machine has power."""
        ...

    def on(self) -> None:
        """Switch it on and wait until it is; does nothing to a machine that is on."""
        ...

    def off(self) -> None:
        """Cut its power and wait until it is off: nothing is shut down. Does nothing to a machine that is off."""
        ...

    def reset(self) -> None:
        """Reset it hard; a machine that is off is switched on. Its power is on at the end."""
        ...


def open_power(host: Host, environ: Mapping[str, str] = os.environ) -> Power | None:
    """Return the power switch of `host`, None if its lab file has none.

    Nothing is connected yet. ``PowerFailed`` if credentials are not set or what the driver needs is not installed.
    """
    if host.power is None:
        return None
    return AwaitedPower(host.name, _switch(host, environ))


def _switch(host: Host, environ: Mapping[str, str]) -> Switch:
    assert host.power is not None
    options = host.power.options
    if host.power.driver == "command":
        from tdxhw.lab.power.command import CommandSwitch

        return CommandSwitch(options)
    credentials = Credentials.read(str(options["credentials_env"]), environ, PowerFailed, host.name)
    if host.power.driver == "redfish":
        from tdxhw.lab.power.redfish import RedfishSwitch  # sushy is needed for nothing else

        return RedfishSwitch(options, credentials)
    from tdxhw.lab.ipmitool import Ipmitool
    from tdxhw.lab.power.ipmi import IpmiSwitch

    return IpmiSwitch(Ipmitool(options, credentials))

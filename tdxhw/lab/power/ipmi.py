"""Power control over IPMI 2.0, through ipmitool."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tdxhw.lab.errors import PowerBusy, PowerFailed
from tdxhw.lab.ipmitool import INSTALL, Ipmitool
from tdxhw.lab.power.switch import Button, State

_STATES: Final = {"Chassis Power is on": State.ON, "Chassis Power is off": State.OFF}


class IpmiSwitch:
    """``ipmitool chassis power``; every call is a session of its own."""

    has_reset = True

    def __init__(self, tool: Ipmitool) -> None:
        self.name = f"ipmi {tool.address}"
        self._tool = tool

    @contextmanager
    def connect(self) -> Iterator["IpmiSwitch"]:
        """ipmitool opens and closes the session of each call."""  # noqa: D403 (its name)
        yield self

    def state(self) -> State:
        """Ask for the state."""
        said = self._power("status")
        for line, state in _STATES.items():
            if line in said:
                return state
        raise PowerFailed(f"ipmitool does not say whether the power is on: {said.strip()[-200:]!r}")

    def press(self, button: Button) -> None:
        """Press it once."""
        self._power(button.value)

    def _power(self, command: str) -> str:
        try:
            done = self._tool.run("chassis", "power", command)
        except FileNotFoundError:
            raise PowerFailed(INSTALL) from None
        except OSError as error:
            raise PowerFailed(f"cannot run ipmitool: {error.strerror}") from error
        if done.exit_code == 0:
            return done.stdout
        if refusal := self._tool.refusal(done.stderr + done.stdout):
            raise PowerFailed(refusal)
        raise PowerBusy(self._tool.problem(done))

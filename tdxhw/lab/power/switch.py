"""Reach a power state and stay polite: what all drivers have in common.

A driver knows one way to ask and to press buttons, once. Retries, waiting and limits in time are here: BMCs apply a
change late (seconds), forget one that comes while they are busy, and restart themselves now and then.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from tdxhw.lab.errors import PowerBusy, PowerFailed

_LONGEST_WAIT_S: Final = 15.0


class State(Enum):
    """What a machine's power is, or is on its way to be."""

    ON = "on"
    OFF = "off"
    CHANGING = "changing"


class Button(Enum):
    """What a driver can be asked to do; all of it at once and hard."""

    ON = "on"
    OFF = "off"
    RESET = "reset"


class NoSuchButton(PowerFailed):
    """The machine cannot do that at all."""


class Buttons(Protocol):
    """An open connection to a driver's hardware. Both raise ``PowerBusy`` if a later try may work."""

    def state(self) -> State:
        """Ask once, within seconds."""
        ...

    def press(self, button: Button) -> None:
        """Press once, within seconds; the state may change later."""
        ...


class Switch(Protocol):
    """A driver."""

    @property
    def name(self) -> str:
        """``redfish https://bmc-1``: what errors call it."""
        ...

    @property
    def has_reset(self) -> bool:
        """Whether it knows `Button.RESET`."""
        ...

    def connect(self) -> AbstractContextManager[Buttons]:
        """Connect for a few calls, and leave nothing open."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take [s]."""

    answer_s: float = 60.0  # for one question, busy answers included
    change_s: float = 120.0  # until a state is reached
    again_s: float = 30.0  # after this a button that changed nothing is pressed again
    poll_s: float = 0.5


class AwaitedPower:
    """Switches a machine and returns when it is done. The `tdxhw.lab.power.Power` of every driver."""

    def __init__(
        self,
        host: str,
        switch: Switch,
        patience: Patience = Patience(),
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = switch.name
        self._host = host
        self._switch = switch
        self._patience = patience
        self._clock = clock
        self._sleep = sleep

    def is_on(self) -> bool:
        """Return whether the machine has power; one that is on its way has."""
        return (
            self._until(lambda buttons: buttons.state(), self._patience.answer_s, "its state is unknown")
            is not State.OFF
        )

    def on(self) -> None:
        """Switch it on, if it is off, and wait until it is."""
        self._reach(State.ON, Button.ON)

    def off(self) -> None:
        """Cut its power, if it is on, and wait until it is off. Nothing is shut down or written to disks."""
        self._reach(State.OFF, Button.OFF)

    def reset(self) -> None:
        """Reset it hard (without such a button: off and on); one that is off is switched on. It is on at the end."""
        if self._switch.has_reset:
            with suppress(NoSuchButton):
                self._reset()
                return
        self.off()
        self.on()

    def _reset(self) -> None:
        done = False

        def press(buttons: Buttons) -> State | None:
            nonlocal done
            state = buttons.state()
            if state is State.CHANGING:
                return None
            if state is State.ON and not done:
                buttons.press(Button.RESET)
                done = True
            return state

        if self._until(press, self._patience.change_s, "cannot be reset") is State.ON:
            self._reach(State.ON, Button.ON, pressed_at=self._clock())  # some are off for a moment
        else:
            self.on()

    def _reach(self, wanted: State, button: Button, *, pressed_at: float | None = None) -> None:
        def approach(buttons: Buttons) -> State | None:
            nonlocal pressed_at
            state = buttons.state()
            if state is wanted:
                return state
            now = self._clock()
            if pressed_at is None or now - pressed_at >= self._patience.again_s:
                buttons.press(button)
                pressed_at = now
            return None

        self._until(approach, self._patience.change_s, f"is not {wanted.value}")

    def _until(self, attempt: Callable[[Buttons], State | None], limit_s: float, what: str) -> State:
        """Repeat `attempt` until it returns a state, over one connection as long as that holds."""
        deadline = self._clock() + limit_s
        tries = 0  # that found it busy, in a row
        while True:
            busy = ""
            try:
                with self._switch.connect() as buttons:
                    while (state := attempt(buttons)) is None:
                        tries = 0
                        self._pause(deadline, self._patience.poll_s, f"{what} after {limit_s:g} s")
                    return state
            except _GaveUp as error:
                raise PowerFailed(f"{self._host}: {self.name}: {error}") from None
            except PowerBusy as error:
                busy = str(error)
            except NoSuchButton as error:
                raise NoSuchButton(f"{self._host}: {self.name}: {error}") from error
            except PowerFailed as error:
                raise PowerFailed(f"{self._host}: {self.name}: {error}") from error
            # Longer each time: a BMC locks an account that logs in too often, and takes minutes to restart.
            tries += 1
            wait_s = min(self._patience.poll_s * 2**tries, _LONGEST_WAIT_S)
            try:
                self._pause(deadline, wait_s, f"{what} after {limit_s:g} s: {busy}")
            except _GaveUp as error:
                raise PowerFailed(f"{self._host}: {self.name}: {error}") from None

    def _pause(self, deadline: float, wait_s: float, why: str) -> None:
        left_s = deadline - self._clock()
        if left_s <= 0:
            raise _GaveUp(why)
        self._sleep(min(wait_s, left_s))


class _GaveUp(Exception):  # noqa: N818
    """The time is over."""

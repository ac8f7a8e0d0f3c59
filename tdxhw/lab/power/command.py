"""Power control by commands of yours: a switched socket, a KVM, a lab's own tool.

``status`` says ``on`` or ``off`` as the last word of its output (``ipmitool chassis power status`` does, too).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tdxhw.lab.bounded_command import Finished, run_bounded
from tdxhw.lab.errors import PowerBusy, PowerFailed
from tdxhw.lab.power.switch import Button, State

_LIMIT_S: Final = 60.0
_WORDS: Final = {state.value: state for state in (State.ON, State.OFF)}


class CommandSwitch:
    """Runs one program per button, without a shell."""

    name = "command"

    def __init__(self, options: Mapping[str, str | int | tuple[str, ...]]) -> None:
        self._argv = {name: argv for name, argv in options.items() if isinstance(argv, tuple)}

    @property
    def has_reset(self) -> bool:
        """Whether the lab file has a command for it; without one it is off and on."""
        return Button.RESET.value in self._argv

    @contextmanager
    def connect(self) -> Iterator["CommandSwitch"]:
        """Each command is on its own: there is nothing to connect."""
        yield self

    def state(self) -> State:
        """Run ``status`` and read its last word."""
        words = self._run("status").stdout.split()
        state = _WORDS.get(words[-1].strip(".!").lower()) if words else None
        if state is None:
            raise PowerFailed(f"status has to say 'on' or 'off' last, not {' '.join(words)[-60:]!r}")
        return state

    def press(self, button: Button) -> None:
        """Run the button's command."""
        self._run(button.value)

    def _run(self, which: str) -> Finished:
        argv = self._argv[which]
        try:
            done = run_bounded(argv, _LIMIT_S)
        except OSError as error:
            raise PowerFailed(f"{which}: cannot run {argv[0]!r}: {error.strerror}") from error
        if done.exit_code is None:
            raise PowerFailed(f"{which}: {argv[0]} was still running after {_LIMIT_S:g} s")
        if done.exit_code != 0:
            raise PowerBusy(f"{which}: {argv[0]}: exit code {done.exit_code}: {done.said[:200]}")
        return done

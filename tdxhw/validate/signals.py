"""Ctrl-C, or a terminal that is closed, while a host has another kernel: it is rolled back first."""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Final, Self

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """The first Ctrl-C, SIGTERM or SIGHUP ends the validation and rolls back, one more leaves the host as it is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shielded = ""
        self._warned = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over; only a program's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in _ENDS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def shield(self, what: str, *, insisted: bool) -> None:
        """From now on, unless the user has `insisted` before, one signal is only answered by a warning."""
        self._shielded, self._warned = what, insisted
        if insisted:
            self._say(f"interrupted; {what}. Once more leaves the host as it is")

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if self._shielded and not self._warned:
            self._warned = True
            with suppress(RuntimeError):  # the signal came in the middle of printing another line
                self._say(f"{self._shielded}: once more, and the host is left as it is")
            return
        raise KeyboardInterrupt

"""Ctrl-C and SIGTERM, which CI systems send to cancel: the run ends, and what it has found so far is written.

In a test's own code the `KeyboardInterrupt` comes at once. While fixtures are set up or give back what they hold, and
while a report is written, it waits for that to end, which takes milliseconds: cut off in the middle these would lose
results and leave things open. A second signal always comes at once.
"""

import signal
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Final, Self

import pytest

_INSIST_S: Final = 2.0
"""Python cannot raise out of a C library's callback: a `KeyboardInterrupt` that was lost there comes again [s]."""


class Interruption:
    """A pytest plugin, and the context in which the signals mean this. Enter it in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        """Whether the user wants the run to end."""
        self._waits = self._in_test = False

    def __enter__(self) -> Self:
        """Take the signals over, but for one that our parent made us ignore (``nohup``, a shell's ``&``)."""
        self._before = {
            number: signal.signal(number, self._signalled)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if self._in_test:
            signal.setitimer(signal.ITIMER_REAL, _INSIST_S, _INSIST_S)
        if again or not self._waits:
            raise KeyboardInterrupt

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """End the run between two tests, if it was to end during the first."""
        self._waits = True
        try:
            result = yield
        finally:
            self._waits = False
        if self.requested:
            raise KeyboardInterrupt
        return result

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """Let a test be interrupted where it is. This is inside the test's time limit, whose timer then insists."""
        time_limit = signal.getsignal(signal.SIGALRM)

        def alarmed(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            if callable(time_limit):
                time_limit(number, frame)

        signal.signal(signal.SIGALRM, alarmed)
        self._waits, self._in_test = False, True
        try:
            if self.requested:  # while its fixtures were set up
                raise KeyboardInterrupt
            return (yield)
        finally:
            self._waits, self._in_test = True, False
            signal.signal(signal.SIGALRM, time_limit)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Let reports be written to their end."""
        self._waits = True
        return (yield)

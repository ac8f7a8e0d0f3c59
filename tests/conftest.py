"""What holds for every test of the project."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The gate runs on small shared machines: how long an example takes there says nothing about the code.
settings.register_profile("gate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gate")

# A gate started in the background inherits an ignored SIGINT, and so would every program that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hangups_are_heard() -> Iterator[None]:
    """Undo for one test what ``nohup make test`` hands down: SIGHUP ignored, here and in every program started."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)

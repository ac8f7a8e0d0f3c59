"""What can go wrong around lab hosts. All of it is exit code 2: one line, no traceback, says what to do."""

from tdxhw.errors import HarnessError


class InventoryError(HarnessError):
    """A lab file or its folder is wrong; the message begins with ``file:line``."""


class FactsError(HarnessError):
    """What was recorded of a host cannot be used."""


class LabUnreachable(HarnessError):  # noqa: N818
    """A host cannot be reached, or does not let us in."""


class HostKeyRefused(LabUnreachable):
    """A host's key is unknown, or is not the one that is known."""


class ConnectionLost(LabUnreachable):
    """A connection that was there is gone. Says nothing about the command that ran over it."""


class LeaseHeld(HarnessError):  # noqa: N818
    """Somebody else has the host."""


class LeaseLost(LeaseHeld):
    """A host that was ours is not any more: nothing is to be done to it."""


class RemoteFailed(HarnessError):  # noqa: N818
    """A command that has to work failed on a host."""


class PowerFailed(HarnessError):  # noqa: N818
    """A host's power could not be read or switched."""


class PowerBusy(PowerFailed):
    """Not now: what switches the power is busy, restarting or out of reach. Worth another try."""


class ConsoleFailed(HarnessError):  # noqa: N818
    """A host's console cannot be opened."""

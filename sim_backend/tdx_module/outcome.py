"""What the handling of a VM exit of a TD comes to."""

from enum import IntEnum
from typing import Final


class Outcome(IntEnum):
    """What the handling of a VM exit comes to."""

    COMPLETED = 0  # the instruction is done: resume the guest after it
    RESUME = 1  # resume the guest where it is: an event will be delivered, or the instruction runs again
    TD_EXIT = 2  # the host's registers are set


INTERRUPTED: Final = -1
"""What a leaf returns that an interrupt cut short: the guest's registers stay and the TDCALL runs again."""

EXITED: Final = -2
"""What a leaf returns that made a TD exit by itself: nothing is left to do."""

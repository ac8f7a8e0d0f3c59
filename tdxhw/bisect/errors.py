"""What can go wrong around a bisection. All of it is exit code 2: one line, no traceback, says what to do."""

from tdxhw.errors import HarnessError


class BisectError(HarnessError):
    """The bisection cannot begin, or could not go on."""

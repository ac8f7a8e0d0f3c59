"""What can go wrong with the history. All of it is exit code 2: one line, no traceback, says what to do."""

from tdxhw.errors import HarnessError


class HistoryError(HarnessError):
    """The history cannot be opened, read or written. What is in it stays as it was."""

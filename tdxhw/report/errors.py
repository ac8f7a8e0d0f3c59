"""What can go wrong with results. All of it is exit code 2: one line, no traceback, says what to do."""

from tdxhw.errors import HarnessError


class ReportError(HarnessError):
    """A file of results cannot be used, or two of them cannot be compared."""

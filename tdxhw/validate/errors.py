"""What can be in the way of a validation. None of it says anything about the kernel on trial."""

from tdxhw.errors import HarnessError


class CannotValidate(HarnessError):  # noqa: N818
    """It could not be done: the same exit code as an inconclusive verdict, for `git bisect run`."""

    exit_code = 125


class Refused(HarnessError):  # noqa: N818
    """The candidate or the host is not fit for it; nothing was touched. Says what to do."""


class ChangeFailed(HarnessError):  # noqa: N818
    """A change on the host was refused, or did not work. What it had done is in the host's journal."""


class WrongKernel(HarnessError):  # noqa: N818
    """Another kernel came up than the one on trial or the host's own."""


class Stranded(HarnessError):  # noqa: N818
    """The host does not answer, and nothing is left to bring it back."""

"""What ``tdxhw abi`` raises: one line, exit code 2."""

from tdxhw.errors import HarnessError


class AbiError(HarnessError):
    """A kernel, or a part of one, that cannot be read: names the file and what to do."""

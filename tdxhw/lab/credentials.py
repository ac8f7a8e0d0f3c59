"""A BMC's user and password: from an environment variable, and from there to nowhere that anybody could read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from tdxhw.errors import HarnessError


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password; neither is shown when the value is printed."""

    user: str = field(repr=False)
    password: str = field(repr=False)
    variable: str  # where they came from, which is what errors name

    @classmethod
    def read(cls, variable: str, environ: Mapping[str, str], error: type[HarnessError], whose: str) -> Self:
        """Return what `variable` holds as USER:PASSWORD, or raise `error` that says what to set."""
        value = environ.get(variable)
        if value is None:
            raise error(f"{whose}: the environment variable {variable} is not set: it has to hold USER:PASSWORD")
        user, colon, password = value.partition(":")
        # A line end would be part of the password: what a file holds that was read whole.
        if not colon or not user or set(value) & set("\0\r\n"):
            raise error(f"{whose}: the environment variable {variable} has to hold one line, USER:PASSWORD")
        return cls(user, password, variable)

"""The result of one check."""

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """How a check came out. ``UNKNOWN`` is not a pass: the host did not let us look."""

    PASS = "PASS"  # noqa: S105  (not a password)
    WARN = "WARN"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw, and what to do about it."""

    status: Status
    detail: str
    remedy: str = ""


def passed(detail: str) -> Finding:
    """Return a ``PASS``."""
    return Finding(Status.PASS, detail)


def warned(detail: str, remedy: str) -> Finding:
    """Return a ``WARN``: TDs run, but somebody should know."""
    return Finding(Status.WARN, detail, remedy)


def failed(detail: str, remedy: str) -> Finding:
    """Return a ``FAIL``: no TD runs, or no run of tdxhw, until this is changed."""
    return Finding(Status.FAIL, detail, remedy)


def unknown(detail: str, remedy: str) -> Finding:
    """Return an ``UNKNOWN``; the remedy says how to let us look."""
    return Finding(Status.UNKNOWN, detail, remedy)

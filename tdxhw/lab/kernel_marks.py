"""A line in the kernel log at the beginning of each test: what the kernel says then is tied to it by its own clock.

As the kernel's own selftests do. Only a kernel on trial gets them. A console may be seconds behind, and its lines are
dated when they come; printk's time stands in the line itself, and a mark says which time of the host that is.
"""

import os
import re
import time
from contextlib import suppress
from typing import Final

ASKED_FOR: Final = "TDXHW_KERNEL_MARKS"
"""The environment variable with which `tdxhw validate` asks for them. Others do not: the kernel log is a ring, and the
marks of weeks would drive what a host's own kernel said at its boot out of it."""

_KMSG: Final = "/dev/kmsg"
_LONGEST: Final = 300  # [characters] of a test's name; a record of printk holds a thousand
HEAD: Final = "tdxhw: "
"""How every line of ours in the kernel log begins."""
_MARK: Final = re.compile(rf"{HEAD}.* began at (\d{{1,12}}\.\d{{6}})$")


def are_asked_for() -> bool:
    """Whether somebody reads the kernel log of this run."""
    return os.environ.get(ASKED_FOR) == "1"


def mark(nodeid: str, *, path: str = _KMSG) -> float:
    """Return the time [s since 1970], and write into the kernel log, where we may, that the test begins at it."""
    name = nodeid.encode("unicode_escape").decode("ascii")[:_LONGEST]  # one line, whatever it is called
    now = time.time()
    # Opened each time: the kernel lets through ten lines of one open file in five seconds. As a warning, so that it is
    # on the console wherever the kernel's warnings are.
    with suppress(OSError):
        kmsg = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.write(kmsg, f"<4>{HEAD}{name} began at {now:.6f}\n".encode())
        finally:
            os.close(kmsg)
    return now


def is_ours(text: str) -> bool:
    """Whether a line of the kernel log is one of ours, also if it was torn."""
    return text.startswith(HEAD)


def marked_time(text: str) -> float | None:
    """Return the host's time in a mark [s since 1970], None in any other line."""
    found = _MARK.match(text)
    return float(found[1]) if found else None

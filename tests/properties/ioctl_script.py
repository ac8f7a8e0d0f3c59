"""Runs calls that are text, so that a sequence that went wrong is a script already."""

import inspect
from typing import Any

from tests.properties import ioctl_vocabulary
from uapi_ctypes.kernel import Kernel

SETUP = ("kvm = Kvm(kernel)", "low, program, ports_memory = Memory(0x1_0000), image(), ports()")
_REPLAY = '''

def replay(kernel: Kernel) -> None:
    """Make the calls; raise `Disagreement` at the first that ends otherwise than expected."""
    MADE.append({setup})
    try:
{body}    finally:
        while MADE:
            MADE.pop().close()


if __name__ == "__main__":
    replay(LinuxKernel())
'''


class Script:
    """One sequence on one kernel: every call is a Python expression over `names`, and is noted."""

    def __init__(self, kernel: Kernel) -> None:
        self.names: dict[str, Any] = {**vars(ioctl_vocabulary), "kernel": kernel}
        self.lines: list[str] = list(SETUP)
        for line in SETUP:
            exec(line, self.names)
        self.calls = 0

    def call(self, source: str, *, name: str = "") -> str:
        """Evaluate `source`; return how it ended. Its result is called `name` from now on."""
        self.calls += 1
        found, result = ioctl_vocabulary.attempt(eval(f"lambda: {source}", self.names))
        if name and found == "OK":
            self.names[name] = result
        return found

    def expect(self, expected: str, source: str, *, name: str = "") -> None:
        """Evaluate `source` and fail, with the whole script, unless it ends as `expected`."""
        target = f"{name} = " if name else ""
        self.lines.append(f"{target}expect({expected!r}, lambda: {source})")
        found = self.call(source, name=name)
        if expected not in ("?", found):
            raise ioctl_vocabulary.Disagreement(f"{source}: {expected!r} expected, {found!r} found\n{self.text()}")

    def text(self) -> str:
        """Return the script: needs nothing but `uapi_ctypes`."""
        body = "".join(f"        {line}\n" for line in self.lines[1:])
        setup = self.lines[0].replace(" = ", " := ")
        return inspect.getsource(ioctl_vocabulary) + _REPLAY.format(setup=setup, body=body)

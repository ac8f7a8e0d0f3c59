"""What the harness raises.

::

    Exception
    ├─ HarnessError           the run itself could not be done: exit code 2, one line, no traceback
    │  ├─ BackendUnavailable      --on local without /dev/kvm, --on sim without Unicorn
    │  ├─ UnknownName             a suite, profile or capability that does not exist
    │  ├─ PromiseBroken           the host was promised to offer it, the probe says no
    │  ├─ MeasureError            the file is no TDVF image
    │  └─ ReplayInputError        FILE:LINE: what is wrong with the recording
    └─ GuestError             the guest did not do what the test wants: the test fails
       ├─ GuestTimeout            still running after its time limit; shows registers where it may
       ├─ UnexpectedExit          an exit that nobody handles
       └─ GuestFatalError         the guest itself gave up (TDG.VP.VMCALL<ReportFatalError>)

A failed ioctl is neither: it stays a `uapi_ctypes.errors.KvmError`.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class HarnessError(Exception):
    """The run could not be done. The message is one line and says what to do."""

    exit_code: ClassVar[int] = 2
    """The process's, if nobody handles it."""


class BackendUnavailable(HarnessError):  # noqa: N818
    """The kernel that was asked for, real or simulated, cannot be reached from here."""


class UnknownName(HarnessError):  # noqa: N818
    """A name given by the user that names nothing."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        guess = get_close_matches(name, names, 1)
        hint = f"did you mean {guess[0]!r}?" if guess else f"there are: {', '.join(names)}"
        super().__init__(f"no {kind} {name!r}; {hint}")


class PromiseBroken(HarnessError):  # noqa: N818
    """A capability was promised for this host and the probe does not find it."""


class MeasureError(HarnessError):
    """The file to measure is not a TDVF image, or one that cannot be built."""


class ReplayInputError(HarnessError):
    """A recording that cannot be read: names file and line."""


class GuestError(Exception):
    """The guest did not do what was asked of it."""


class GuestTimeout(GuestError):  # noqa: N818
    """The guest was still running when its time limit passed."""


class UnexpectedExit(GuestError):  # noqa: N818
    """KVM_RUN returned with an exit that nobody handles."""


class GuestFatalError(GuestError):
    """The guest reported a fatal error and cannot go on."""

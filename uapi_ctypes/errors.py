"""What a failed call raises.

::

    OSError
    └─ KvmError        .errno .request .hw_error .remedy
    Exception
    └─ BackendLimit    .registers: a simulated kernel met what it does not model
"""

import errno
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from uapi_ctypes.tdx_status import describe

_ERRNO_NAMES: Final[dict[int, str]] = {
    **errno.errorcode,
    errno.EAGAIN: "EAGAIN",
    errno.EDEADLK: "EDEADLK",
    errno.EOPNOTSUPP: "EOPNOTSUPP",
}


def errno_name(err: int) -> str:
    """Return the kernel's name of `err`; Python knows some by their alias (ENOTSUP). Decimal when unknown."""
    return _ERRNO_NAMES.get(err) or str(err)


class KvmError(OSError):
    """A call to KVM failed.

    It *is* an ``OSError``: ``e.errno`` works as everywhere in Python. It adds which request failed, for TDX
    sub-commands what the TDX module answered, and where one is known what to do about it.
    """

    def __init__(self, request: str, err: int, *, hw_error: int = 0, remedy: str = "") -> None:
        super().__init__(err, os.strerror(err))
        self.request = request
        self.hw_error = hw_error  # raw RAX; zero when no SEAMCALL failed
        self.remedy = remedy

    def __str__(self) -> str:
        """``KVM_TDX_FINALIZE_VM: EIO; TDX module: EPT_ENTRY_STATE_INCORRECT(RCX)``."""
        text = f"{self.request}: {errno_name(self.errno or 0)}"
        if self.hw_error:
            text += f"; TDX module: {describe(self.hw_error)}"
        if self.remedy:
            text += f"; {self.remedy}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling: results travel between processes."""
        return _rebuild, (self.request, self.errno, self.hw_error, self.remedy)


def _rebuild(request: str, err: int, hw_error: int, remedy: str) -> KvmError:
    return KvmError(request, err, hw_error=hw_error, remedy=remedy)


class BackendLimit(Exception):  # noqa: N818 - nobody erred
    """The kernel behind `Kernel` is a simulated one and cannot go on without inventing an answer. Never a real one's.

    `registers` are the guest's, where the limit was met while it ran.
    """

    registers: Mapping[str, int] = MappingProxyType({})

    def __str__(self) -> str:
        """Return for example ``the CPU engine cannot execute ... at RIP 0x1000: bytes c5 f1; rip=0x1000 rax=0x0``."""
        text = super().__str__()
        if not self.registers:
            return text
        return f"{text}; " + " ".join(f"{name}={value:#x}" for name, value in self.registers.items())

"""Say in one line how a call must fail."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from uapi_ctypes.errors import KvmError
from uapi_ctypes.tdx_status import Operand, Rax, Status, describe


@contextmanager
def fails_with(
    expected: int, status: Status | None = None, operand: Operand | int = 0
) -> Iterator[pytest.ExceptionInfo[KvmError]]:
    """Check that the block fails with errno `expected`, and that hw_error holds `status` and `operand`.

    Without `status` hw_error must be zero: no SEAMCALL failed, or the kernel does not say.
    """
    with pytest.raises(KvmError) as caught:
        yield caught
    error = caught.value
    name = errno.errorcode[expected]
    assert error.errno == expected, f"expected {name}, got {error}"
    wanted = int(Rax(status, operand)) if status is not None else 0
    assert error.hw_error == wanted, f"expected hw_error {describe(wanted)}, got {describe(error.hw_error)}"

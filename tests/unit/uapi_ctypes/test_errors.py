"""`KvmError`: an OSError that tells the whole story in one line."""

import errno
import pickle

import pytest

from uapi_ctypes.errors import KvmError

LINES: list[tuple[KvmError, str]] = [
    (KvmError("KVM_CREATE_VM", errno.EINVAL), "KVM_CREATE_VM: EINVAL"),
    (
        KvmError("KVM_TDX_FINALIZE_VM", errno.EIO, hw_error=0xC0000B0D00000001),
        "KVM_TDX_FINALIZE_VM: EIO; TDX module: EPT_ENTRY_STATE_INCORRECT(RCX)",
    ),
    (
        KvmError("KVM_TDX_INIT_VM", errno.EINVAL, hw_error=0xC000010000000045),
        "KVM_TDX_INIT_VM: EINVAL; TDX module: OPERAND_INVALID(CPUID_CONFIG)",
    ),
    (
        KvmError("KVM_TDX_INIT_VM", errno.EIO, hw_error=0x1234567800000001),
        "KVM_TDX_INIT_VM: EIO; TDX module: 0x1234567800000001",
    ),
    (
        KvmError("open /dev/kvm", errno.EACCES, remedy="join its group"),
        "open /dev/kvm: EACCES; join its group",
    ),
    (KvmError("KVM_RUN", 4095), "KVM_RUN: 4095"),
]


@pytest.mark.parametrize(("error", "line"), LINES, ids=[line for _, line in LINES])
def test_reads_as(error: KvmError, line: str) -> None:
    assert str(error) == line


@pytest.mark.parametrize("error", [error for error, _ in LINES], ids=str)
def test_survives_the_way_to_another_process(error: KvmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is KvmError
    assert str(copy) == str(error)
    assert (copy.errno, copy.request, copy.hw_error) == (error.errno, error.request, error.hw_error)


def test_is_caught_as_an_oserror_with_its_errno() -> None:
    with pytest.raises(OSError, match="KVM_RUN: EINTR") as caught:
        raise KvmError("KVM_RUN", errno.EINTR)
    assert caught.value.errno == errno.EINTR
    assert caught.value.strerror == "Interrupted system call"

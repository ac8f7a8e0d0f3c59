"""ioctl numbers: made as the kernel makes them, told apart by all 32 bits."""

from hypothesis import given
from hypothesis import strategies as st

from uapi_ctypes.ioctl import KvmRequest, io, ior, iow, iowr, name_of, size_of


def test_every_number_has_one_name() -> None:
    assert len(KvmRequest.__members__) == len(KvmRequest)
    for request in KvmRequest:
        assert name_of(request) == request.name


def test_an_unknown_number_is_shown_in_hex() -> None:
    assert name_of(0x1234) == "ioctl 0x1234"


def test_requests_with_the_same_low_byte_stay_apart() -> None:
    assert KvmRequest.KVM_SET_TSC_KHZ & 0xFF == KvmRequest.KVM_SET_DEBUGREGS & 0xFF
    assert KvmRequest.KVM_GET_TSC_KHZ & 0xFF == KvmRequest.KVM_ENABLE_CAP & 0xFF
    assert KvmRequest.KVM_SIGNAL_MSI & 0xFF == KvmRequest.KVM_SET_XSAVE & 0xFF
    assert KvmRequest.KVM_IRQ_LINE_STATUS & 0xFF == KvmRequest.KVM_REGISTER_COALESCED_MMIO & 0xFF


@given(st.integers(0, 0xFF), st.integers(0, 0x3FFF))
def test_size_and_direction_are_in_the_number(nr: int, size: int) -> None:
    assert size_of(iow(nr, size)) == size_of(ior(nr, size)) == size_of(iowr(nr, size)) == size
    assert iow(nr, size) | ior(nr, size) == iowr(nr, size)
    assert io(nr) == 0xAE00 | nr

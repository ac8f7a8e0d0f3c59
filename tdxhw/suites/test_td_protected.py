"""What KVM refuses on a TD because its state is protected or belongs to the module."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import TrustDomain
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import KvmMemFlag, KvmUserspaceMemoryRegion2
from uapi_ctypes.kvm_state import (
    KvmDebugregs,
    KvmFpu,
    KvmGuestDebug,
    KvmRegs,
    KvmSregs,
    KvmSregs2,
    KvmXcrs,
    KvmXsave,
)
from uapi_ctypes.units import PAGE_SIZE
from uapi_ctypes.vcpu import Vcpu

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
UNMAPPED = 0x1000

READS: dict[str, Callable[[Vcpu], object]] = {
    "regs": Vcpu.get_regs,
    "sregs": Vcpu.get_sregs,
    "sregs2": Vcpu.get_sregs2,
    "fpu": Vcpu.get_fpu,
    "xsave": Vcpu.get_xsave,
    "xcrs": Vcpu.get_xcrs,
    "debugregs": Vcpu.get_debugregs,
    "lapic": Vcpu.get_lapic,
}
WRITES: dict[str, Callable[[Vcpu], object]] = {
    "regs": lambda vcpu: vcpu.set_regs(KvmRegs()),
    "sregs": lambda vcpu: vcpu.set_sregs(KvmSregs()),
    "sregs2": lambda vcpu: vcpu.set_sregs2(KvmSregs2()),
    "fpu": lambda vcpu: vcpu.set_fpu(KvmFpu()),
    "xsave": lambda vcpu: vcpu.set_xsave(KvmXsave()),
    "xcrs": lambda vcpu: vcpu.set_xcrs(KvmXcrs()),
    "debugregs": lambda vcpu: vcpu.set_debugregs(KvmDebugregs()),
    "guest_debug": lambda vcpu: vcpu.set_guest_debug(KvmGuestDebug()),
}


@pytest.fixture
def td(trust_domain: MAKE_TD) -> TrustDomain:
    return trust_domain().build()


@pytest.mark.parametrize("state", READS)
def test_state_cannot_be_read(td: TrustDomain, state: str) -> None:
    with fails_with(errno.EINVAL):
        READS[state](td.vcpus[0])


@pytest.mark.parametrize("state", WRITES)
def test_state_cannot_be_written(td: TrustDomain, state: str) -> None:
    with fails_with(errno.EINVAL):
        WRITES[state](td.vcpus[0])


@pytest.mark.dialects("mainline")
@pytest.mark.parametrize("request_", [KvmRequest.KVM_SET_REGS, KvmRequest.KVM_SET_SREGS, KvmRequest.KVM_SET_XSAVE])
def test_an_unreadable_argument_is_efault_before_anything_is_einval(td: TrustDomain, request_: KvmRequest) -> None:
    with fails_with(errno.EFAULT):
        td.vcpus[0].ioctl(request_, UNMAPPED)


@pytest.mark.dialects("mainline")
def test_a_second_irqchip_is_eexist(td: TrustDomain) -> None:
    with fails_with(errno.EEXIST):
        td.vm.create_irqchip()


@pytest.mark.dialects("mainline")
def test_a_pit_needs_a_full_irqchip(td: TrustDomain) -> None:
    with fails_with(errno.ENOENT):
        td.vm.create_pit2()


@pytest.mark.dialects("mainline")
def test_smi_does_not_exist(td: TrustDomain) -> None:
    with fails_with(errno.ENOTTY):
        td.vcpus[0].smi()


@pytest.mark.dialects("mainline")
def test_the_tsc_of_a_vcpu_cannot_be_changed(td: TrustDomain) -> None:
    with fails_with(errno.EINVAL):
        td.vcpus[0].set_tsc_khz(1_000_000)


@pytest.mark.dialects("mainline")
def test_read_only_memory_does_not_exist(td: TrustDomain) -> None:
    assert td.vm.check_extension(KvmCap.KVM_CAP_READONLY_MEM) == 0
    slot = td.add_slot(1 << 30, PAGE_SIZE, private=False)

    region = KvmUserspaceMemoryRegion2(7, KvmMemFlag.KVM_MEM_READONLY, 2 << 30, PAGE_SIZE, slot.shared.address)
    with fails_with(errno.EINVAL):
        td.vm.ioctl(KvmRequest.KVM_SET_USER_MEMORY_REGION2, region)


@pytest.mark.dialects("mainline")
def test_a_slot_at_a_shared_gpa_is_einval(td: TrustDomain) -> None:
    with fails_with(errno.EINVAL):
        td.add_slot(td.shared_bit, PAGE_SIZE)


@pytest.mark.dialects("mainline")
def test_private_memory_cannot_be_logged_for_dirty_pages(td: TrustDomain) -> None:
    slot = td.add_slot(1 << 30, PAGE_SIZE)
    assert slot.guest_memfd is not None
    flags = KvmMemFlag.KVM_MEM_GUEST_MEMFD | KvmMemFlag.KVM_MEM_LOG_DIRTY_PAGES

    with fails_with(errno.EINVAL):
        td.vm.set_user_memory_region2(
            8, 2 << 30, PAGE_SIZE, slot.shared.address, flags, guest_memfd=slot.guest_memfd.fd
        )


@pytest.mark.parametrize(
    ("gpa", "size", "attributes"),
    [
        pytest.param(0x800, PAGE_SIZE, 8, id="unaligned"),
        pytest.param(0, 0, 8, id="empty"),
        pytest.param((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 8, id="wraps"),
        pytest.param(0, PAGE_SIZE, 1, id="unknown attribute"),
    ],
)
def test_refuses_memory_attributes(td: TrustDomain, gpa: int, size: int, attributes: int) -> None:
    with fails_with(errno.EINVAL):
        td.vm.set_memory_attributes(gpa, size, attributes)


def test_memory_attributes_need_no_slot_and_may_be_repeated(td: TrustDomain) -> None:
    td.set_private(1 << 40, PAGE_SIZE, private=True)
    td.set_private(1 << 40, PAGE_SIZE, private=True)
    td.set_private(1 << 40, PAGE_SIZE, private=False)

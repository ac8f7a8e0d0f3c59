"""Private and shared memory of a TD: acceptance, conversion, and what the host can see."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.errors import GuestTimeout
from tdxhw.exits import FatalError, MapGpa, MemoryFault, PortIo
from tdxhw.expect import fails_with
from tdxhw.guest.layout import FAILED_CHECK, PORT_SUCCESS, PORT_TEST
from tdxhw.td import SEPT_VE_DISABLE, TEST_PAGE_GPA, TrustDomain
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.tdx_status import TdvmcallStatus
from uapi_ctypes.units import PAGE_SIZE

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))


def test_the_host_does_not_see_private_memory(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    """The guest fills a page with 0x5A, and finds it unchanged after the host has looked and written."""
    td = launch("host_reading_private_mem")
    serve = vmm(td)
    low = serve.expect(td.vcpus[0], PortIo)
    high = serve.expect(td.vcpus[0], PortIo)
    gpa = low.value | high.value << 32

    seen = td.memory.read(gpa, PAGE_SIZE)
    td.memory.write(gpa, b"\xee" * PAGE_SIZE)

    assert (low.port, high.port) == (PORT_TEST, PORT_TEST)
    assert b"\x5a" not in seen
    assert serve.run(td.vcpus[0]) == SUCCESS


def test_a_page_is_zero_when_it_is_accepted(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("accept_page")
    td.memory.write(TEST_PAGE_GPA, b"\xee" * PAGE_SIZE)

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


def test_touching_a_pending_page_is_a_ve_and_the_handler_accepts_it(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("accept_page_on_ve")

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.dialects("mainline")
def test_touching_a_pending_page_without_ve_kills_the_td(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("touch_page", attributes=SEPT_VE_DISABLE)

    with fails_with(errno.EIO):
        vmm(td).run(td.vcpus[0])
    with fails_with(errno.EIO):
        td.vm.check_extension(0)


@pytest.mark.dialects("v17")
def test_touching_a_pending_page_without_ve_never_ends(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("touch_page", attributes=SEPT_VE_DISABLE)

    with pytest.raises(GuestTimeout):
        vmm(td).run(td.vcpus[0], limit_s=0.2)


def test_map_gpa_lets_host_and_guest_exchange_values(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("shared_mem")
    serve = vmm(td)
    announced = serve.expect(td.vcpus[0], PortIo)
    assert (announced.port, announced.value) == (PORT_TEST, TEST_PAGE_GPA)

    assert td.memory.read(TEST_PAGE_GPA, 8) == (0xCAFE).to_bytes(8, "little")
    td.memory.write(TEST_PAGE_GPA, (0xBEEF).to_bytes(8, "little"))

    assert serve.expect(td.vcpus[0], PortIo).value == 0xBEEF
    assert serve.run(td.vcpus[0]) == SUCCESS


@pytest.mark.parametrize("gpaw", [48, 52])
def test_map_gpa_names_the_page_without_its_shared_bit(launch: LAUNCH, vmm: MAKE_VMM, gpaw: int) -> None:
    td = launch("shared_mem", gpaw=gpaw)
    serve, asked = vmm(td), []

    def grant(request: MapGpa) -> TdvmcallStatus:
        asked.append(request)
        return serve.convert(request)

    serve.on_map_gpa = grant
    serve.expect(td.vcpus[0], PortIo)

    assert asked == [MapGpa(TEST_PAGE_GPA, 1, to_private=False)]


def test_a_page_that_was_shared_is_zero_when_it_is_private_again(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("map_gpa_and_back")

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


def test_the_vmm_may_refuse_a_conversion(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("shared_mem")
    serve = vmm(td)
    serve.on_map_gpa = lambda _request: TdvmcallStatus.INVALID_OPERAND

    error = serve.expect(td.vcpus[0], FatalError)

    assert error.code == FAILED_CHECK + 1


def test_the_vmm_may_ask_the_guest_to_try_a_conversion_again(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("map_gpa_and_back")
    serve = vmm(td)
    answers = iter([TdvmcallStatus.RETRY, None, TdvmcallStatus.RETRY, None])

    def sometimes(request: MapGpa) -> TdvmcallStatus:
        return next(answers) or serve.convert(request)

    serve.on_map_gpa = sometimes

    exit_ = serve.run(td.vcpus[0])

    if isinstance(exit_, FatalError):
        # Linux 6.16 knows one refusal only: whatever hypercall.ret says, the guest sees INVALID_OPERAND.
        assert exit_.code == FAILED_CHECK + 1
        assert int.from_bytes(exit_.message[8:16], "little") == TdvmcallStatus.INVALID_OPERAND
    else:
        assert exit_ == SUCCESS
        assert next(answers, "all used") == "all used"


def test_a_private_access_to_shared_memory_is_a_memory_fault(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("accept_page_on_ve")
    td.set_private(TEST_PAGE_GPA, PAGE_SIZE, private=False)

    assert vmm(td).run(td.vcpus[0]) == MemoryFault(TEST_PAGE_GPA, PAGE_SIZE, private=True)


def test_a_memory_fault_can_be_answered_by_converting(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("accept_page_on_ve")
    td.set_private(TEST_PAGE_GPA, PAGE_SIZE, private=False)
    serve = vmm(td)
    serve.convert_on_fault = True

    assert serve.run(td.vcpus[0]) == SUCCESS


def test_a_private_access_outside_every_slot_is_a_memory_fault(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("jump_into_nowhere")
    nowhere = 0xDEAD_0000

    assert vmm(td).run(td.vcpus[0]) == MemoryFault(nowhere, PAGE_SIZE, private=True)


@pytest.mark.requires("td-pre-fault")
@pytest.mark.dialects("mainline")
def test_a_page_that_was_faulted_in_beforehand_still_has_to_be_accepted(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("accept_page")
    region = KvmPreFaultMemory(TEST_PAGE_GPA, PAGE_SIZE)

    td.vcpus[0].pre_fault_memory(region)

    assert (region.gpa, region.size) == (TEST_PAGE_GPA + PAGE_SIZE, 0)
    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("td-pre-fault")
@pytest.mark.dialects("mainline")
def test_nothing_can_be_faulted_in_before_finalize(trust_domain: Callable[..., TrustDomain]) -> None:
    td = trust_domain().build()
    td.add_slot(TEST_PAGE_GPA, PAGE_SIZE)

    with fails_with(errno.EOPNOTSUPP):
        td.vcpus[0].pre_fault_memory(KvmPreFaultMemory(TEST_PAGE_GPA, PAGE_SIZE))


@pytest.mark.requires("td-pre-fault")
@pytest.mark.dialects("mainline")
def test_a_shared_gpa_cannot_be_faulted_in(trust_domain: Callable[..., TrustDomain]) -> None:
    td = trust_domain().build()
    td.finalize()

    with fails_with(errno.EINVAL):
        td.vcpus[0].pre_fault_memory(KvmPreFaultMemory(td.shared_bit, PAGE_SIZE))

"""Guests that crash, hang or execute garbage: the right exit or a time limit, never a hang of the host."""

from collections.abc import Callable

import pytest

from tdxhw.errors import GuestTimeout, UnexpectedExit
from tdxhw.exits import SHUTDOWN, FatalError, InternalError, PortIo
from tdxhw.guest.layout import PORT_SUCCESS, UNHANDLED_EXCEPTION
from tdxhw.td import TrustDomain
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.kvm_run import KvmInternalError
from uapi_ctypes.tdx_status import Status

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))
UD = 6


def test_a_triple_fault_is_a_shutdown(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("triple_fault")

    assert vmm(td).run(td.vcpus[0]) == SHUTDOWN


def test_a_vcpu_that_triple_faulted_cannot_be_entered_again(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("triple_fault")
    serve = vmm(td)
    assert serve.run(td.vcpus[0]) == SHUTDOWN

    error = serve.expect(td.vcpus[0], InternalError)

    assert error.suberror == KvmInternalError.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    assert error.data[0] >> 32 == Status.VCPU_STATE_INCORRECT


def test_an_endless_loop_ends_at_its_time_limit(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("endless_loop")

    with pytest.raises(GuestTimeout, match=r"still running after 0\.3 s; "):
        vmm(td).run(td.vcpus[0], limit_s=0.3)


def test_a_td_can_be_torn_down_while_its_guest_loops(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("endless_loop")
    with pytest.raises(GuestTimeout):
        vmm(td).run(td.vcpus[0], limit_s=0.1)

    td.close()


def test_garbage_is_an_invalid_opcode_in_the_guest(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("garbage_instructions")

    assert vmm(td).expect(td.vcpus[0], FatalError).code == UNHANDLED_EXCEPTION | UD


def test_another_td_is_not_disturbed_by_one_that_crashed(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    crashed, healthy = launch("triple_fault"), launch("td_lifecycle")
    vmm(crashed).run(crashed.vcpus[0])

    assert vmm(healthy).run(healthy.vcpus[0]) == SUCCESS


def test_an_exit_that_nobody_expects_is_named(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("triple_fault")

    with pytest.raises(UnexpectedExit, match="KVM_EXIT_SHUTDOWN where PortIo was expected"):
        vmm(td).expect(td.vcpus[0], PortIo)

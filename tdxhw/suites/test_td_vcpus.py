"""What each vCPU of a running TD knows about itself, and several of them at once."""

from collections.abc import Callable

import pytest

from tdxhw.exits import PortIo
from tdxhw.guest.layout import PORT_SUCCESS, PORT_TEST
from tdxhw.td import SEPT_VE_DISABLE, TrustDomain
from tdxhw.vmm import Guest, Vmm, run_together
from uapi_ctypes.caps import KvmCap

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))


def vp_info(td: TrustDomain, serve: Vmm, index: int = 0) -> list[int]:
    """Return RCX, RDX, R8, R9, R10 and R11 of TDG.VP.INFO on vCPU `index`."""
    halves: list[int] = []
    serve.on_port(PORT_TEST, write=lambda value, _size: halves.append(value))
    assert serve.run(td.vcpus[index]) == SUCCESS
    return [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]


@pytest.mark.parametrize("gpaw", [48, 52])
def test_vp_info_shows_the_address_width(launch: LAUNCH, vmm: MAKE_VMM, gpaw: int) -> None:
    td = launch("tdcall_vp_info", gpaw=gpaw)

    assert vp_info(td, vmm(td))[0] & 0x3F == gpaw


def test_vp_info_shows_the_attributes(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("tdcall_vp_info", attributes=SEPT_VE_DISABLE)

    assert vp_info(td, vmm(td))[1] == SEPT_VE_DISABLE


@pytest.mark.requires("two-vcpus")
def test_vp_info_shows_how_many_vcpus_there_are_and_which_this_is(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("tdcall_vp_info", vcpus=2)
    most = td.vm.check_extension(KvmCap.KVM_CAP_MAX_VCPUS)

    for index in range(2):
        _, _, r8, r9, *_ = vp_info(td, vmm(td), index)
        assert (r8 & 0xFFFF_FFFF, r8 >> 32) == (2, most)
        assert r9 & 0xFFFF_FFFF == index


@pytest.mark.requires("two-vcpus")
def test_two_vcpus_run_at_once_and_meet(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    """Each waits for the other in a loop: one after the other would never end."""
    td = launch("two_vcpus", vcpus=2)
    serve = vmm(td)
    indices: list[int] = []
    serve.on_port(PORT_TEST, write=lambda value, _size: indices.append(value))

    assert run_together(serve, td.vcpus) == [SUCCESS, SUCCESS]
    assert sorted(indices) == [0, 1]

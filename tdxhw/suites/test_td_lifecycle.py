"""Whole lives of TDs: created, measured, run from the reset vector into 64-bit mode, torn down."""

from collections.abc import Callable

import pytest

from tdxhw.exits import PortIo
from tdxhw.guest.layout import PORT_SUCCESS, PORT_TEST
from tdxhw.guest.payload import Payload
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.td import SEPT_VE_DISABLE, TrustDomain
from tdxhw.vmm import Guest, Vmm

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))


@pytest.mark.requires("tdx")
def test_a_td_runs_and_reports_success(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("td_lifecycle")

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("tdx")
@pytest.mark.parametrize("gpaw", [48, 52])
def test_a_td_runs_with_either_address_width(launch: LAUNCH, vmm: MAKE_VMM, gpaw: int) -> None:
    td = launch("td_lifecycle", gpaw=gpaw)

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("tdx")
def test_a_td_runs_with_sept_ve_disable(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("td_lifecycle", attributes=SEPT_VE_DISABLE)

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("tdx")
def test_ten_lives_one_after_the_other(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    for _ in range(10):
        td = launch("td_lifecycle")
        assert vmm(td).run(td.vcpus[0]) == SUCCESS
        td.close()


@pytest.mark.requires("tdx", "hkids>=3")
def test_three_tds_side_by_side(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    domains = [launch("td_ioexit") for _ in range(3)]
    first = [vmm(td).run(td.vcpus[0]) for td in domains]

    assert first == [PortIo(PORT_TEST, 1, True, b"\xab")] * 3
    for td in domains:
        serve = vmm(td)
        serve.on_port(PORT_TEST, read=lambda _size: 0xAC)
        assert serve.run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("tdx")
def test_a_td_beside_an_ordinary_vm(launch: LAUNCH, ordinary_vm: Callable[..., OrdinaryVm], vmm: MAKE_VMM) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vm.start_real_mode(vm.create_vcpu(), b"\xb0\x5a\xe6\x31\xf4")  # mov al, 0x5a; out 0x31, al; hlt
    td = launch("td_lifecycle")

    assert vmm(vm).run(vm.vcpus[0]) == PortIo(0x31, 1, True, b"\x5a")
    assert vmm(td).run(td.vcpus[0]) == SUCCESS


@pytest.mark.requires("tdx")
def test_a_td_that_was_interrupted_in_the_middle_is_torn_down(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    """The guest waits for an answer that never comes; the fixture and the host check that nothing is left."""
    td = launch("td_ioexit")

    vmm(td).expect(td.vcpus[0], PortIo)


@pytest.mark.requires("tdx")
def test_a_td_that_was_never_finalized_is_torn_down(
    trust_domain: Callable[..., TrustDomain], payload: Callable[[str], Payload]
) -> None:
    td = trust_domain().build()
    image = payload("td_lifecycle")
    td.add_slot(image.gpa, len(image.image))
    td.add_memory(image.gpa, image.image)


@pytest.mark.requires("kvm", "vm-type-default")
def test_the_same_kind_of_payload_runs_in_an_ordinary_vm(
    ordinary_vm: Callable[..., OrdinaryVm], payload: Callable[[str], Payload], vmm: MAKE_VMM
) -> None:
    image = payload("pio_and_halt")
    vm = ordinary_vm()
    vm.add_slot(image.gpa, len(image.image))
    vm.memory.write(image.gpa, image.image)
    vm.set_supported_cpuid(vm.create_vcpu())
    serve, written = vmm(vm), []
    serve.on_port(PORT_TEST, read=lambda _size: 0x41, write=lambda value, _size: written.append(value))

    assert serve.run(vm.vcpus[0]) == SUCCESS
    assert written == [0xAB, 0x42]

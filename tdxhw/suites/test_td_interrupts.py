"""Interrupts that the host sends a TD, and that the TD sends itself: posted, never injected."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tdxhw.exits import PortIo, Tdvmcall
from tdxhw.guest.layout import PORT_SUCCESS, PORT_TEST
from tdxhw.td import TrustDomain
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.kvm import KvmIrqRoutingEntry
from uapi_ctypes.kvm_run import TdxExitNr
from uapi_ctypes.tdx_status import TdvmcallStatus

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))
MSI_ADDRESS = 0xFEE0_0000  # destination APIC id 0, physical, fixed
VECTOR = 0x20
GSI = 5
MSI_ROUTE = 2
ROUND_OUTSIDE, ROUND_HALTED, ROUND_SELF = 1, 2, 3
UNTIL_HALTED_S = 0.05


@contextmanager
def by_msi(td: TrustDomain) -> Iterator[Callable[[], None]]:
    """Send the interrupt with KVM_SIGNAL_MSI."""

    def send() -> None:
        assert td.vm.signal_msi(MSI_ADDRESS, VECTOR) == 1, "one vCPU takes it"

    yield send


@contextmanager
def by_irqfd(td: TrustDomain) -> Iterator[Callable[[], None]]:
    """Send the interrupt by way of an eventfd and the routing table."""
    route = KvmIrqRoutingEntry(gsi=GSI, type=MSI_ROUTE)
    route.u[0], route.u[2] = MSI_ADDRESS, VECTOR
    td.vm.set_gsi_routing([route])
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        td.vm.irqfd(fd, GSI)
        yield lambda: os.eventfd_write(fd, 1)
    finally:
        os.close(fd)


@pytest.mark.parametrize("by", [by_msi, by_irqfd])
def test_the_guest_is_notified_by_the_interrupt_that_it_asked_for(launch: LAUNCH, vmm: MAKE_VMM, by: object) -> None:
    """While the vCPU is out, while it is halted, and by the guest itself; the payload counts."""
    assert callable(by)
    td = launch("event_notify_interrupt")
    serve, asked, rounds, errors = vmm(td), [], [], []
    threads: list[threading.Thread] = []

    def notify(call: Tdvmcall) -> TdvmcallStatus:
        asked.append(call.args[0])
        return TdvmcallStatus.SUCCESS

    with by(td) as send:

        def send_later() -> None:
            time.sleep(UNTIL_HALTED_S)
            try:
                send()
            except (AssertionError, OSError) as error:
                errors.append(error)

        def next_round(number: int, _size: int) -> None:
            rounds.append(number)
            if number == ROUND_OUTSIDE:
                send()
                time.sleep(UNTIL_HALTED_S)  # an irqfd is served by another thread of the kernel's
            elif number == ROUND_HALTED:
                threads.append(threading.Thread(target=send_later))
                threads[-1].start()

        serve.on_tdvmcall(TdxExitNr.TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT, notify)
        serve.on_port(PORT_TEST, write=next_round)

        assert serve.run(td.vcpus[0]) == SUCCESS
        for thread in threads:
            thread.join()
    assert (asked, rounds, errors) == ([VECTOR], [ROUND_OUTSIDE, ROUND_HALTED, ROUND_SELF], [])


def test_an_apic_that_the_guest_has_not_enabled_takes_nothing(launch: LAUNCH) -> None:
    td = launch("event_notify_interrupt")

    assert td.vm.signal_msi(MSI_ADDRESS, VECTOR) == 0

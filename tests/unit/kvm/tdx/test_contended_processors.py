"""More threads than logical processors: nobody holds a lock that it needs a processor to give back."""

import threading
import time

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.small_vmm import errno_of
from tests.unit.kvm.tdx.test_concurrency import N_VCPUS, PAGE, accept_for_ever
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd
from uapi_ctypes.vcpu import Vcpu


@pytest.mark.parametrize("online", [1, 2])
def test_a_zap_gets_a_processor_while_all_of_them_fault(td: TestTd, machine: Machine, online: int) -> None:
    td.build(accept_for_ever(), n_vcpus=N_VCPUS)
    for lp in range(online, machine.lps.count):
        machine.lps.set_online(lp, online=False)
    stop = threading.Event()
    rounds = [0] * N_VCPUS
    outcomes: set[str | None] = set()

    def run(number: int, vcpu: Vcpu) -> None:
        while not stop.is_set():
            outcomes.add(errno_of(vcpu.run))
            rounds[number] += 1

    zaps = 0

    def zap() -> None:
        nonlocal zaps
        while not stop.is_set():
            td.gmem1.punch_hole(0, N_VCPUS * 8 * PAGE)
            td.vm.set_memory_attributes(0, 8 * PAGE, 0)
            td.vm.set_memory_attributes(0, 8 * PAGE, PRIVATE)
            zaps += 1

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(td.vcpus)]
    threads.append(threading.Thread(target=zap, daemon=True))
    try:
        for thread in threads:
            thread.start()
        time.sleep(1)
        stop.set()
        td.end_runs(threads)
    finally:
        for lp in range(online, machine.lps.count):
            machine.lps.set_online(lp, online=True)
    assert zaps
    assert all(rounds)
    assert outcomes <= {None, "EFAULT", "EINTR"}

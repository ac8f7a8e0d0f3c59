"""KVM hypercalls of ordinary guests that other vCPUs feel."""

import time

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm, errno_of, in_thread, ordinary_host, wait_until
from uapi_ctypes.kvm import KvmIrqRoutingEntry
from uapi_ctypes.kvm_run import KvmExit

KVM_HC_KICK_CPU = 5
KVM_IRQ_ROUTING_MSI = 2


def kick(apic_id: int) -> bytes:
    """MOV EAX, 5; XOR EBX, EBX; MOV ECX, id; VMCALL; OUT 0x10, AL."""
    return bytes.fromhex("66b8 05000000 6631db 66b9") + apic_id.to_bytes(4, "little") + bytes.fromhex("0f01c1 e610")


HALT_THEN_OUT = bytes.fromhex("fa f4 e611")  # CLI; HLT; OUT 0x11, AL


@pytest.fixture
def small() -> SmallVm:
    vm = SmallVm(SimKernel(ordinary_host()), kick(1), split=True, n_vcpus=2)
    vm.memory[CODE + 0x100] = HALT_THEN_OUT
    vm.start(vm.vcpus[1], CODE + 0x100)
    vm.vcpus[1].set_mp_state(0)
    return vm


def test_a_kick_wakes_a_vcpu_that_is_halted_with_interrupts_off(small: SmallVm) -> None:
    with small:
        thread, result = in_thread(small.vcpus[1].run)
        time.sleep(0.05)
        assert not result, "it is halted"
        assert small.vcpus[0].run() == KvmExit.KVM_EXIT_IO
        wait_until(lambda: bool(result))
        thread.join(10)
        assert result == [KvmExit.KVM_EXIT_IO]


def run_again(vm: SmallVm, index: int, ip: int) -> int:
    regs = vm.vcpus[index].get_regs()
    regs.rip = ip
    vm.vcpus[index].set_regs(regs)
    return vm.vcpus[index].run()


def test_a_kick_that_comes_first_is_kept_for_the_next_hlt_and_used_up_by_it(small: SmallVm) -> None:
    with small:
        assert small.vcpus[0].run() == KvmExit.KVM_EXIT_IO
        assert small.vcpus[1].run() == KvmExit.KVM_EXIT_IO, "its HLT did not wait"
        thread, result = in_thread(lambda: run_again(small, 1, CODE + 0x100))
        time.sleep(0.05)
        assert not result, "the second HLT waits"
        run_again(small, 0, CODE)
        thread.join(10)
        assert result == [KvmExit.KVM_EXIT_IO]


def test_the_whole_table_of_4096_routes_is_set_in_a_moment(small: SmallVm) -> None:
    entries = [KvmIrqRoutingEntry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI) for gsi in range(4096)]
    with small:
        begun = time.process_time()
        small.vm.set_gsi_routing(entries)
        assert time.process_time() - begun < 0.5, "the time grows with the table, not with its square"


def test_a_second_route_for_the_gsi_of_an_msi_is_refused(small: SmallVm) -> None:
    def entries(second: int) -> list[KvmIrqRoutingEntry]:
        return [KvmIrqRoutingEntry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI) for gsi in (3, 4, second)]

    with small:
        assert errno_of(lambda: small.vm.set_gsi_routing(entries(3))) == "EINVAL"
        assert errno_of(lambda: small.vm.set_gsi_routing(entries(5))) is None

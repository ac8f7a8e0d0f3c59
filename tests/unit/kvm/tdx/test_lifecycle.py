import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import R8, R9, RBX, RCX, RDX, RSI, TDG_VP_INFO, Program
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.kvm_run import KvmExit

ALL = pytest.mark.parametrize("machine", ["7.3", "7.2", "6.16", "v17"], indirect=True)


@ALL
def test_a_td_lives_its_whole_life_and_leaves_nothing_behind(td: TestTd, machine: Machine) -> None:
    td.build(Program().done())
    assert td.run_to_end() == []
    assert machine.leftovers() != []
    td.close()
    assert machine.leftovers() == []


@ALL
def test_the_vcpu_starts_with_what_init_vcpu_and_the_module_say(td: TestTd) -> None:
    td.build(Program().report(RCX, R8, RBX, RSI).done(), rcx=0x1234_5678_9ABC)
    rcx, r8, rbx, rsi = td.run_to_end()
    assert (rcx, r8) == (0x1234_5678_9ABC, 0x1234_5678_9ABC)
    assert rbx & 0x3F == 48
    assert rsi == 0


def test_the_guest_sees_attributes_and_vcpu_counts(td: TestTd) -> None:
    td.build(Program().tdcall(TDG_VP_INFO).report(RCX, RDX, R8, R9).done(), attributes=1 << 28, n_vcpus=2)
    gpaw, attributes, vcpus, index = td.run_to_end()
    assert gpaw & 0x3F == 48
    assert attributes == 1 << 28
    assert vcpus == 2 | td.machine.profile.n_cpus << 32
    assert index == 0


def test_every_vcpu_starts_at_the_reset_vector(td: TestTd) -> None:
    td.build(Program().report(RSI).done(), n_vcpus=2)
    for vcpu in td.vcpus:
        assert td.run(vcpu) == KvmExit.KVM_EXIT_IO
    assert td.reported == [0, 1]


def test_a_second_td_gets_another_key_id_and_both_run(machine: Machine) -> None:
    with TestTd(machine) as first, TestTd(machine) as second:
        first.build(Program().out(0x40, 1).done())
        second.build(Program().out(0x40, 2).done())
        assert machine.free_hkids == machine.profile.private_hkids - 1 - 2
        for number, td in enumerate((first, second, first, second)):
            assert td.run() == KvmExit.KVM_EXIT_IO
            expected = (1, 2, 0x600D, 0x600D)[number]
            assert int.from_bytes(td.vcpu.io_data(), "little") == expected

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import (
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    TDG_VP_INFO,
    Program,
)
from tests.unit.kvm.tdx.vmm import GPAW48, X2APIC, TestTd, cpuid_entry
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2

ALL = pytest.mark.parametrize("machine", ["7.3", "7.2", "6.18", "6.16", "v17"], indirect=True)


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


@ALL
def test_rdx_is_the_processor_and_every_other_register_is_0(td: TestTd) -> None:
    entries = [cpuid_entry(0x8000_0008, eax=48 if td.v17 else GPAW48), cpuid_entry(1, eax=0x806F8)]
    if td.v17:
        entries.append(cpuid_entry(0xD, 0, 1, eax=3))
    td.enable_caps().init_vm(entries=entries).add_memory()
    vcpu = td.create_vcpu(init=False)
    table = [cpuid_entry(1, eax=0x806F8, ecx=X2APIC), cpuid_entry(0x8000_0008, eax=48 if td.v17 else GPAW48)]
    vcpu.set_cpuid2(KvmCpuid2.of(table))
    vcpu.tdx_init_vcpu(5)
    td.add_image(Program().report(RDX, RBP, RDI, R9, R10, R11, R12, R13, R14, R15).done()).finalize()
    rdx, *others = td.run_to_end()
    assert rdx == 0x806F8, "family, model and stepping of the TD's own CPUID"
    assert others == [0] * 9


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

"""KVM_CHECK_EXTENSION and KVM_ENABLE_CAP on a TD, beside what /dev/kvm says of the same capabilities."""

import errno

import pytest

from sim_backend.machine import boot
from tests.unit.kvm.tdx.vmm import SPLIT_IRQCHIP, TestTd, error_of

IRQCHIP, MAX_VCPUS, SYNC_REGS, READONLY_MEM, X86_SMM, MULTI_ADDRESS_SPACE = 0, 66, 74, 81, 117, 118
X2APIC_API, BUS_LOCK_EXIT, EXIT_HYPERCALL, PMU_CAPABILITY, NOTIFY_VMEXIT = 129, 193, 201, 212, 219
USER_MEMORY2, MEMORY_ATTRIBUTES, GUEST_MEMFD, VM_TYPES, PRE_FAULT, BUS_CYCLES_NS, GMEM_FLAGS = (
    231, 233, 234, 235, 236, 237, 244,
)  # fmt: skip
LARGEST_BUS_CYCLE_NS = ((1 << 63) - 1) // (0xFFFF_FFFF * 128)


@pytest.mark.parametrize(
    ("capability", "on_device", "on_vm"),
    [
        (READONLY_MEM, 1, 0),
        (X86_SMM, 1, 0),
        (SYNC_REGS, 7, 0),
        (GMEM_FLAGS, 3, 1),
        (MULTI_ADDRESS_SPACE, 2, 1),
        (X2APIC_API, 15, 11),
        (BUS_CYCLES_NS, 1, 1),
        (EXIT_HYPERCALL, 4096, 4096),
        (PRE_FAULT, 1, 1),
        (IRQCHIP, 1, 1),
        (PMU_CAPABILITY, 1, 1),
        (GUEST_MEMFD, 1, 1),
        (USER_MEMORY2, 1, 1),
        (VM_TYPES, 1 | 1 << 5, 1 | 1 << 5),
        (MAX_VCPUS, 1024, 4),
    ],
)
def test_device_and_vm_answer_for_themselves(td: TestTd, capability: int, on_device: int, on_vm: int) -> None:
    assert (td.kvm.check_extension(capability), td.vm.check_extension(capability)) == (on_device, on_vm)


def test_private_memory_is_an_attribute_of_tds_only(td: TestTd) -> None:
    with td.kvm.create_vm(0) as ordinary:
        assert (td.vm.check_extension(MEMORY_ATTRIBUTES), ordinary.check_extension(MEMORY_ATTRIBUTES)) == (8, 0)


@pytest.mark.parametrize("machine", ["6.16"], indirect=True)
def test_6_16_knows_neither_gmem_flags_nor_eoi_suppression(td: TestTd) -> None:
    assert td.vm.check_extension(GMEM_FLAGS) == 0
    td.vm.enable_cap(SPLIT_IRQCHIP, 24)
    assert td.vm.check_extension(X2APIC_API) == 3
    for flags in (4, 8):
        assert error_of(lambda flags=flags: td.vm.enable_cap(X2APIC_API, flags)) == errno.EINVAL  # type: ignore[misc]


def test_eoi_suppression_needs_a_split_irqchip_and_cannot_be_both_on_and_off(td: TestTd) -> None:
    assert error_of(lambda: td.vm.enable_cap(X2APIC_API, 4)) == errno.EINVAL
    assert error_of(lambda: td.vm.enable_cap(X2APIC_API, 8)) == 0
    td.vm.enable_cap(SPLIT_IRQCHIP, 24)
    assert error_of(lambda: td.vm.enable_cap(X2APIC_API, 4)) == 0
    assert error_of(lambda: td.vm.enable_cap(X2APIC_API, 12)) == errno.EINVAL


@pytest.mark.parametrize("pins", [0, 24, 4096])
def test_a_split_irqchip_may_reserve_up_to_4096_routes(td: TestTd, pins: int) -> None:
    assert error_of(lambda: td.vm.enable_cap(SPLIT_IRQCHIP, pins)) == 0


def test_one_route_more_is_einval_even_where_there_is_an_irqchip(td: TestTd) -> None:
    td.enable_caps()
    assert error_of(lambda: td.vm.enable_cap(SPLIT_IRQCHIP, 4097)) == errno.EINVAL


@pytest.mark.parametrize(
    ("value", "expected"), [(LARGEST_BUS_CYCLE_NS, errno.ENXIO), (LARGEST_BUS_CYCLE_NS + 1, errno.EINVAL)]
)
def test_a_bus_cycle_that_overflows_is_einval_before_the_irqchip_is_asked_for(
    td: TestTd, value: int, expected: int
) -> None:
    assert error_of(lambda: td.vm.enable_cap(BUS_CYCLES_NS, value)) == expected


class TestBeforeVcpus:
    @pytest.mark.parametrize(
        ("capability", "argument"), [(PMU_CAPABILITY, 1), (NOTIFY_VMEXIT, 1 << 32 | 1), (BUS_CYCLES_NS, 40)]
    )
    def test_it_works_and_afterwards_it_is_einval(self, td: TestTd, capability: int, argument: int) -> None:
        td.enable_caps()
        assert error_of(lambda: td.vm.enable_cap(capability, argument)) == 0
        td.init_vm()
        td.create_vcpu(init=False)
        assert error_of(lambda: td.vm.enable_cap(capability, argument)) == errno.EINVAL

    @pytest.mark.parametrize("argument", [0, 2, 3])
    def test_the_pmu_can_only_be_switched_off(self, td: TestTd, argument: int) -> None:
        assert error_of(lambda: td.vm.enable_cap(PMU_CAPABILITY, argument)) == errno.EINVAL

    @pytest.mark.parametrize("argument", [0, 2, 4 | 1])
    def test_notify_needs_its_enabled_bit(self, td: TestTd, argument: int) -> None:
        assert error_of(lambda: td.vm.enable_cap(NOTIFY_VMEXIT, argument)) == errno.EINVAL

    @pytest.mark.parametrize(("argument", "expected"), [(1, 0), (2, 0), (3, errno.EINVAL), (4, errno.EINVAL)])
    def test_bus_lock_exits_are_off_or_on(self, td: TestTd, argument: int, expected: int) -> None:
        assert error_of(lambda: td.vm.enable_cap(BUS_LOCK_EXIT, argument)) == expected

    def test_without_the_hosts_feature_they_are_einval_or_without_effect(self) -> None:
        machine = boot("7.3", capabilities={PMU_CAPABILITY: 0, NOTIFY_VMEXIT: 0, BUS_LOCK_EXIT: 0})
        with TestTd(machine) as td:
            assert error_of(lambda: td.vm.enable_cap(PMU_CAPABILITY, 1)) == errno.EINVAL
            assert error_of(lambda: td.vm.enable_cap(NOTIFY_VMEXIT, 1)) == errno.EINVAL
            assert error_of(lambda: td.vm.enable_cap(BUS_LOCK_EXIT, 2)) == 0
            assert not td.ops.vm.bus_lock_exit
        machine.shutdown()


class TestAddresses:
    """What an ordinary VM without unrestricted guest mode needs: accepted, and no use to a TD."""

    def test_the_tss_may_lie_anywhere_below_its_limit(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.set_tss_addr(0xFFFF_D000)) == 0
        assert error_of(lambda: td.vm.set_tss_addr(0xFFFF_D001)) == errno.EINVAL

    def test_the_identity_map_is_set_before_vcpus(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.set_identity_map_addr(0xFFFB_C000)) == 0
        assert error_of(lambda: td.vm.ioctl(0x4008AE48, 0x10)) == errno.EFAULT
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        assert error_of(lambda: td.vm.set_identity_map_addr(0xFFFB_C000)) == errno.EINVAL
        assert error_of(lambda: td.vm.ioctl(0x4008AE48, 0x10)) == errno.EINVAL


def test_the_boot_processor_must_be_a_possible_one(td: TestTd) -> None:
    assert error_of(lambda: td.vm.set_boot_cpu_id(4095)) == 0
    assert error_of(lambda: td.vm.set_boot_cpu_id(4096)) == errno.EINVAL

"""The ordinary ioctls on a TD: where they answer differently because the VM is one."""

import ctypes
import errno
import mmap
from functools import partial

import pytest

from sim_backend.machine import Machine, boot
from tests.unit.kvm.tdx.guest_code import S_BIT, SHARED_ALIAS, Program
from tests.unit.kvm.tdx.vmm import (
    GUEST_MEMFD,
    PRIVATE,
    SPLIT_IRQCHIP,
    X2APIC,
    TestTd,
    UserMemory,
    cpuid_entry,
    error_of,
)
from uapi_ctypes.device import Kvm
from uapi_ctypes.kvm_state import KvmCpuid2, KvmGuestDebug, KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

PAGE = 4096
X2APIC_API, EXIT_HYPERCALL, MAX_VCPUS, APIC_BUS_CYCLES_NS, PMU_CAPABILITY = 129, 201, 66, 237, 212
LOG_DIRTY, READONLY = 1, 2


@pytest.fixture
def built(td: TestTd) -> TestTd:
    return td.build(Program().done())


class TestCreateVm:
    def test_a_host_without_a_module_has_no_tds(self) -> None:
        host = boot("7.3", tdx_module="none")
        with Kvm(host.kernel()) as kvm:
            assert error_of(lambda: kvm.create_vm(5)) == errno.EINVAL
        host.shutdown()

    def test_mainline_does_not_know_v17s_number(self, machine: Machine) -> None:
        with Kvm(machine.kernel()) as kvm:
            assert kvm.check_extension(235) & 1 << 5
            assert error_of(lambda: kvm.create_vm(2)) == errno.EINVAL


@pytest.mark.parametrize(
    ("capability", "on_vm"),
    [
        (74, 0),
        (81, 0),
        (117, 0),
        (118, 1),
        (244, 1),
        (233, 8),
        (237, 1),
        (129, 11),
        (201, 4096),
        (236, 1),
        (0, 1),
        (234, 1),
        (231, 1),
    ],
)
def test_the_vm_fd_answers_for_the_td(td: TestTd, capability: int, on_vm: int) -> None:
    assert td.vm.check_extension(capability) == on_vm


def test_max_vcpus_is_the_number_of_cpus_and_x2apic_api_grows_with_the_irqchip(td: TestTd) -> None:
    assert td.vm.check_extension(MAX_VCPUS) == td.machine.profile.n_cpus
    td.enable_caps()
    assert td.vm.check_extension(X2APIC_API) == 15


class TestEnableCap:
    @pytest.mark.parametrize(
        ("capability", "argument", "expected"),
        [
            (MAX_VCPUS, 2, errno.EINVAL),
            (99999, 0, errno.EINVAL),
            (X2APIC_API, 16, errno.EINVAL),
            (X2APIC_API, 12, errno.EINVAL),
            (X2APIC_API, 4, errno.EINVAL),
            (EXIT_HYPERCALL, 1, errno.EINVAL),
            (APIC_BUS_CYCLES_NS, 0, errno.EINVAL),
            (APIC_BUS_CYCLES_NS, 40, errno.ENXIO),
            (PMU_CAPABILITY, 0, errno.EINVAL),
            (SPLIT_IRQCHIP, 5000, errno.EINVAL),
        ],
    )
    def test_refusals(self, td: TestTd, capability: int, argument: int, expected: int) -> None:
        assert error_of(lambda: td.vm.enable_cap(capability, argument)) == expected

    def test_flags_are_einval(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.enable_cap(X2APIC_API, 3, flags=1)) == errno.EINVAL

    def test_a_second_irqchip_and_a_late_one_are_eexist(self, td: TestTd) -> None:
        td.enable_caps()
        assert error_of(lambda: td.vm.enable_cap(SPLIT_IRQCHIP, 24)) == errno.EEXIST

    def test_40_ns_after_the_irqchip_and_before_vcpus(self, td: TestTd) -> None:
        td.enable_caps()
        td.vm.enable_cap(APIC_BUS_CYCLES_NS, 40)
        assert td.vm.check_extension(APIC_BUS_CYCLES_NS) == 40
        td.init_vm()
        td.create_vcpu(init=False)
        assert error_of(lambda: td.vm.enable_cap(APIC_BUS_CYCLES_NS, 40)) == errno.EINVAL


class TestIrqchip:
    def test_a_full_irqchip_is_enotty_and_eexist_after_a_split_one(self, td: TestTd) -> None:
        assert error_of(td.vm.create_irqchip) == errno.ENOTTY
        td.enable_caps()
        assert error_of(td.vm.create_irqchip) == errno.EEXIST

    @pytest.mark.parametrize("machine", ["6.16"], indirect=True)
    def test_6_16_creates_it_and_then_no_vcpu_can_be(self, td: TestTd) -> None:
        td.vm.create_irqchip()
        td.init_vm()
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EINVAL

    def test_there_is_no_pit_and_no_pic(self, td: TestTd) -> None:
        td.enable_caps()
        assert error_of(td.vm.create_pit2) == errno.ENOENT
        assert error_of(lambda: td.vm.get_irqchip(0)) == errno.ENXIO

    def test_irq_line_needs_an_irqchip(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.irq_line(4, 1)) == errno.ENXIO
        td.enable_caps()
        assert error_of(lambda: td.vm.irq_line(4, 1)) == 0


class TestCreateVcpu:
    def test_init_vm_comes_first(self, td: TestTd) -> None:
        td.enable_caps()
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EIO

    def test_after_finalize_it_is_eio(self, built: TestTd) -> None:
        assert error_of(lambda: built.vm.create_vcpu(1)) == errno.EIO

    def test_a_split_irqchip_is_required(self, td: TestTd) -> None:
        td.init_vm()
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EINVAL

    def test_no_more_than_there_are_cpus(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        for vcpu_id in range(td.machine.profile.n_cpus):
            td.create_vcpu(vcpu_id, init=False)
        assert error_of(lambda: td.vm.create_vcpu(9)) == errno.EINVAL

    @pytest.mark.parametrize(("machine", "expected"), [("7.3", errno.EEXIST), ("7.2", errno.EIO)], indirect=["machine"])
    def test_a_duplicate_on_a_finalised_td(self, built: TestTd, expected: int) -> None:
        assert error_of(lambda: built.vm.create_vcpu(0)) == expected


class TestCpuidAndTsc:
    @pytest.fixture
    def vcpu(self, td: TestTd) -> Vcpu:
        td.enable_caps().init_vm()
        return td.create_vcpu(init=False)

    def test_a_bad_linear_size_is_einval(self, vcpu: Vcpu) -> None:
        bad = [cpuid_entry(1, ecx=X2APIC), cpuid_entry(0x80000008, eax=0x2030)]
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of(bad))) == errno.EINVAL

    def test_after_the_first_entry_only_the_same_table_is_accepted(self, built: TestTd) -> None:
        built.run_to_end()
        same = built.vcpu.get_cpuid2(16)
        built.vcpu.set_cpuid2(KvmCpuid2.of(same.filled()))
        other = KvmCpuid2.of(list(reversed(same.filled())))
        assert error_of(lambda: built.vcpu.set_cpuid2(other)) == errno.EINVAL

    def test_the_tsc_of_a_vcpu_cannot_be_set(self, vcpu: Vcpu) -> None:
        assert error_of(lambda: vcpu.set_tsc_khz(1_000_000)) == errno.EINVAL
        assert vcpu.get_tsc_khz() == vcpu.vm.get_tsc_khz()

    def test_the_vms_tsc_is_set_before_vcpus(self, td: TestTd) -> None:
        td.vm.set_tsc_khz(1_000_000)
        assert td.vm.get_tsc_khz() == 1_000_000
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        assert error_of(lambda: td.vm.set_tsc_khz(2_000_000)) == errno.EINVAL


class TestMemory:
    def region(self, td: TestTd, slot: int, gpa: int, size: int, flags: int = 0, *, hva: int | None = None) -> int:
        address = td.low.hva if hva is None else hva
        return error_of(lambda: td.vm.set_user_memory_region2(slot, gpa, size, address, flags))

    def test_read_only_slots_are_einval(self, td: TestTd) -> None:
        assert self.region(td, 0, 0, PAGE, READONLY) == errno.EINVAL

    def test_a_plain_shared_slot_may_log_dirty_pages(self, td: TestTd) -> None:
        assert self.region(td, 0, 0, PAGE, LOG_DIRTY) == 0

    def test_there_is_one_address_space(self, td: TestTd) -> None:
        assert self.region(td, 1 << 16, 0, PAGE) == errno.EINVAL

    def test_the_s_bit_is_refused_only_after_init_vm(self, td: TestTd) -> None:
        assert self.region(td, 0, S_BIT, PAGE) == 0
        assert self.region(td, 0, S_BIT, 0) == 0
        td.init_vm()
        assert self.region(td, 0, S_BIT, PAGE) == errno.EINVAL
        assert self.region(td, 0, S_BIT - PAGE, 2 * PAGE) == errno.EINVAL

    def test_init_shared_is_refused_and_mmap_accepted(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.create_guest_memfd(PAGE, 2)) == errno.EINVAL
        td.vm.create_guest_memfd(PAGE, 1)

    def test_a_gmem_slot_cannot_be_changed(self, td: TestTd) -> None:
        gmem = td.vm.create_guest_memfd(PAGE)
        td.vm.set_user_memory_region2(0, 0, PAGE, td.low.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
        again = error_of(
            lambda: td.vm.set_user_memory_region2(0, 0, PAGE, td.low.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
        )
        assert again == errno.EINVAL

    def test_another_vms_file_is_einval(self, td: TestTd, machine: Machine) -> None:
        with TestTd(machine) as other:
            gmem = other.vm.create_guest_memfd(PAGE)
            refused = error_of(
                lambda: td.vm.set_user_memory_region2(0, 0, PAGE, td.low.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
            )
            assert refused == errno.EINVAL

    @pytest.mark.parametrize(
        ("gpa", "size", "attributes", "flags"),
        [
            (0, PAGE, 8, 1),
            (0, PAGE, 1, 0),
            (0, 0, 8, 0),
            (1, PAGE, 8, 0),
            (0, 1, 8, 0),
            ((1 << 64) - PAGE, 2 * PAGE, 8, 0),
        ],
    )
    def test_bad_attributes(self, td: TestTd, gpa: int, size: int, attributes: int, flags: int) -> None:
        assert error_of(lambda: td.vm.set_memory_attributes(gpa, size, attributes, flags)) == errno.EINVAL

    def test_attributes_need_no_slot_and_are_idempotent(self, td: TestTd) -> None:
        for _ in range(2):
            td.vm.set_memory_attributes(0x4000_0000, PAGE, PRIVATE)

    def test_dirty_logging_of_shared_memory_sees_the_guests_writes(self, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        td.vm.set_memory_attributes(0, 0x20_0000, 0)
        td.vm.set_user_memory_region2(2, 0, 0x20_0000, td.low.hva, LOG_DIRTY)
        td.create_vcpu()
        program = Program().load(3, SHARED_ALIAS + 0x1000).store(SHARED_ALIAS + 0x3000, 1).out(0x40, 1)
        program.store(SHARED_ALIAS + 0x5000, 1).out(0x40, 1).store(SHARED_ALIAS + 0x3000, 2).done()
        td.add_image(program).finalize()
        bitmap = mmap.mmap(-1, PAGE)
        anchor = ctypes.c_char.from_buffer(bitmap)
        for page in (3, 5, 3):  # reading the log makes a page that was written before count again
            td.run()
            td.vm.get_dirty_log(2, ctypes.addressof(anchor))
            assert int.from_bytes(bitmap[:8], "little") == 1 << page
        del anchor

    def test_dirty_logging_may_begin_when_pages_are_mapped_already(self, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        td.vm.set_memory_attributes(0, 0x20_0000, 0)
        td.vm.set_user_memory_region2(2, 0, 0x20_0000, td.low.hva)
        td.create_vcpu()
        store = Program().store(SHARED_ALIAS + 0x3000, 1).out(0x40, 1)
        td.add_image(store.store(SHARED_ALIAS + 0x3000, 2).done()).finalize()
        td.run()
        td.vm.set_user_memory_region2(2, 0, 0x20_0000, td.low.hva, LOG_DIRTY)
        bitmap = mmap.mmap(-1, PAGE)
        anchor = ctypes.c_char.from_buffer(bitmap)
        td.vm.get_dirty_log(2, ctypes.addressof(anchor))
        assert int.from_bytes(bitmap[:8], "little") == 0
        td.run()
        td.vm.get_dirty_log(2, ctypes.addressof(anchor))
        assert int.from_bytes(bitmap[:8], "little") == 1 << 3
        del anchor


class TestProtectedState:
    @pytest.mark.parametrize(
        "name",
        ["get_regs", "get_sregs", "get_sregs2", "get_fpu", "get_xsave", "get_xcrs", "get_debugregs", "get_lapic"],
    )
    def test_no_register_can_be_read(self, built: TestTd, name: str) -> None:
        assert error_of(getattr(built.vcpu, name)) == errno.EINVAL

    def test_setting_reads_its_argument_first(self, built: TestTd) -> None:
        for request in (0x4090AE82, 0x4138AE84, 0x41A0AE8D, 0x4188AEA7, 0x4080AEA2):
            assert error_of(partial(built.vcpu.ioctl, request, 0x10)) == errno.EFAULT
        assert error_of(lambda: built.vcpu.ioctl(0x4140AECD, 0x10)) == errno.EINVAL, "SET_SREGS2 does not"

    def test_guest_debug_is_einval(self, built: TestTd) -> None:
        assert error_of(lambda: built.vcpu.set_guest_debug(KvmGuestDebug(1))) == errno.EINVAL

    def test_translate_succeeds_and_means_nothing(self, built: TestTd) -> None:
        answer = built.vcpu.translate(0x1234)
        assert (answer.physical_address, answer.valid, answer.writeable, answer.usermode) == (0x1234, 1, 1, 0)

    @pytest.mark.parametrize(
        ("index", "readable"),
        [(0x277, 1), (0x1B, 1), (0xC0000080, 1), (0x10, 0), (0xE7, 0), (0x174, 0), (0xC0000100, 0)],
    )
    def test_only_emulated_msrs_can_be_read(self, built: TestTd, index: int, readable: int) -> None:
        assert built.vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(index)])) == readable

    def test_reading_stops_at_the_first_msr_outside_the_set(self, built: TestTd) -> None:
        assert built.vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(0x277), KvmMsrEntry(0x10), KvmMsrEntry(0x277)])) == 1

    def test_read_only_msrs_cannot_be_set(self, built: TestTd) -> None:
        assert built.vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(0x1B, 0, 0xFEE00900)])) == 0

    def test_setting_an_mp_state(self, built: TestTd) -> None:
        for state in (0, 3, 9, 2):
            built.vcpu.set_mp_state(state)
            assert built.vcpu.get_mp_state() == state
        built.vcpu.set_mp_state(4)
        assert built.vcpu.get_mp_state() == 2
        assert error_of(lambda: built.vcpu.set_mp_state(5)) == errno.EINVAL
        assert error_of(built.vcpu.run) == errno.EINVAL, "INIT_RECEIVED"
        built.vcpu.set_mp_state(0)
        built.run_to_end()

    def test_interrupts_are_stored_and_not_delivered(self, built: TestTd) -> None:
        assert error_of(lambda: built.vcpu.interrupt(256)) == errno.EINVAL
        built.vcpu.interrupt(0x40)
        assert error_of(lambda: built.vcpu.interrupt(0x41)) == errno.EEXIST


class TestSignalMsi:
    def test_without_an_irqchip_it_is_einval(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.signal_msi(0xFEE00000, 0x41)) == errno.EINVAL

    def test_without_a_vcpu_it_is_minus_1(self, td: TestTd) -> None:
        td.enable_caps()
        assert error_of(lambda: td.vm.signal_msi(0xFEE00000, 0x41)) == errno.EPERM

    def test_an_unknown_destination_takes_nothing(self, built: TestTd) -> None:
        assert built.vm.signal_msi(0xFEE00000 | 7 << 12, 0x41) == 0

    def test_init_counts_as_taken_and_does_nothing(self, built: TestTd) -> None:
        assert built.vm.signal_msi(0xFEE00000, 5 << 8) == 1
        built.run_to_end()


def test_boot_cpu_id_decides_who_is_the_boot_processor(td: TestTd) -> None:
    td.vm.set_boot_cpu_id(1)
    td.enable_caps().init_vm()
    first, second = td.create_vcpu(0, init=False), td.create_vcpu(1, init=False)
    assert (first.get_mp_state(), second.get_mp_state()) == (1, 0)
    assert error_of(lambda: td.vm.set_boot_cpu_id(0)) == errno.EBUSY


def test_encrypted_regions_are_not_for_tds(td: TestTd) -> None:
    memory = UserMemory(PAGE)
    assert error_of(lambda: td.vm.memory_encrypt_reg_region(memory.hva, PAGE)) == errno.ENOTTY
    assert error_of(lambda: td.vm.ioctl(0x8010AEBB, 0x10)) == errno.EFAULT


def test_smi_pending_bugs_the_vm_at_the_next_run(built: TestTd) -> None:
    events = built.vcpu.get_vcpu_events()
    events.flags, events.smi.pending = 8, 1
    built.vcpu.set_vcpu_events(events)
    assert error_of(built.vcpu.run) == errno.EIO
    assert error_of(built.vcpu.get_mp_state) == errno.EIO

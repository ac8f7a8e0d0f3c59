"""Halting and interrupts of November 2023, where they differ from mainline's, and what else has no mainline twin."""

import ctypes
import errno
import signal

import pytest

from sim_backend.machine import Machine, boot
from tests.unit.kvm.tdx.guest_code import EVENT_COUNT, R10, RBX, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import GUEST_MEMFD, PRIVATE, V17_CONFIGURED, TestTd, UserMemory, cpuid_entry, error_of
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.tdx_v17 import KvmTdxCmdV17
from uapi_ctypes.tdx_v17 import KvmTdxInitMemRegion as Region
from uapi_ctypes.vcpu import Vcpu

pytestmark = pytest.mark.parametrize("machine", ["v17"], indirect=True)

MEMORY_ENCRYPT_OP = 0xC008AEBA
INIT_VM, INIT_VCPU, INIT_MEM_REGION = 1, 2, 3
HLT, WRMSR, SPIV = 12, 32, 0x80F
HALTED, UNINITIALIZED = 3, 1
MAX_VCPUS = 66
MSI = 0xFEE0_0000
STI = b"\xfb"
PAGE = 4096
INVALID = 0xC000_0100 << 32


def run_into_a_signal(td: TestTd, vcpu: Vcpu | None = None) -> None:
    """Run until a signal ends KVM_RUN, which must be the only way out."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KvmError, match="EINTR"):
            td.run(vcpu)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def enabled_apic() -> Program:
    return Program().vmcall(WRMSR, SPIV, 0x1FF)


class TestHalting:
    def test_with_interrupts_off_a_posted_interrupt_wakes_all_the_same(self, td: TestTd) -> None:
        td.build(enabled_apic().vmcall(HLT, 1).report(R10).done())
        run_into_a_signal(td)
        assert td.vcpu.get_mp_state() == HALTED
        assert td.vm.signal_msi(MSI, 0x41) == 1
        assert td.run_to_end() == [0]

    def test_an_interrupt_that_was_handled_long_ago_wakes_once_more(self, td: TestTd) -> None:
        """The virtual interrupt state is not read, so KVM errs on the side of waking."""
        program = enabled_apic().raw(STI).out(0x40, 1).load(RBX, EVENT_COUNT).report(RBX)
        td.build(program.vmcall(HLT, 0).report(R10).vmcall(HLT, 0).report(R10).done())
        td.run()
        assert td.vm.signal_msi(MSI, 0x41) == 1
        run_into_a_signal(td)
        assert td.reported == [1, 0], "handled, and the first HLT did not wait"
        assert td.vcpu.get_mp_state() == HALTED

    def test_without_any_interrupt_it_sleeps(self, td: TestTd) -> None:
        td.build(Program().vmcall(HLT, 0).report(R10).done())
        run_into_a_signal(td)
        assert td.vcpu.get_mp_state() == HALTED

    def test_a_fresh_application_processor_blocks(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        other = td.create_vcpu(1, init=False)
        run_into_a_signal(td, other)
        assert other.get_mp_state() == UNINITIALIZED


class TestCreation:
    def test_any_irqchip_will_do_but_one_there_must_be(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EINVAL
        td.vm.create_irqchip()
        td.vcpus.append(td.vm.create_vcpu(0))

    def test_an_ordinary_vm_cannot_limit_its_vcpus(self, td: TestTd) -> None:
        with Kvm(td.machine.kernel()) as kvm, kvm.create_vm(0) as vm:
            assert error_of(lambda: vm.enable_cap(MAX_VCPUS, 2)) == errno.EINVAL

    def test_the_limit_counts_and_comes_too_late_for_the_td_after_init_vm(self, seam: ScriptedSeam, td: TestTd) -> None:
        seen: list[int] = []

        def spy(lp: int, regs: list[int]) -> None:
            if regs[0] == H.TDH_MNG_INIT:
                seen.append(int.from_bytes(td.machine.memory.read(regs[2] + 16, 2), "little"))
            seam.execute(lp, regs)

        seam.hook = spy
        td.vm.enable_cap(MAX_VCPUS, 3)
        td.enable_caps().init_vm()
        assert seen == [3]
        td.vm.enable_cap(MAX_VCPUS, 1)
        assert td.vm.check_extension(MAX_VCPUS) == 1
        td.create_vcpu(init=False)
        assert error_of(lambda: td.vm.create_vcpu(1)) == errno.EINVAL


class TestInitVm:
    @pytest.mark.usefixtures("machine")
    def test_a_host_without_5_level_ept_has_no_52_bit_tds(self) -> None:
        old = boot("v17", five_level_ept=False)
        with TestTd(old) as td:
            wide = [cpuid_entry(0xD, 0, 1, eax=3), cpuid_entry(0x8000_0008, eax=52)]
            assert error_of(lambda: td.init_vm(entries=wide)) == errno.EINVAL
            td.init_vm()
        old.shutdown()

    def test_the_misc_control_group_is_not_asked(self, td: TestTd, machine: Machine) -> None:
        assert machine.tdx is not None
        machine.tdx.misc_cg_max = 0
        try:
            td.init_vm()
        finally:
            machine.tdx.misc_cg_max = None

    def test_of_the_tsc_only_the_offset_is_read(self, seam: ScriptedSeam, td: TestTd) -> None:
        td.init_vm()
        assert seam.leaves().count(H.TDH_MNG_RD) == 1

    def test_a_debug_td_protects_its_registers_all_the_same(self, td: TestTd) -> None:
        td.build(Program().out(0x40, 1).done(), attributes=1)
        td.run()
        for read in (td.vcpu.get_regs, td.vcpu.get_sregs, td.vcpu.get_fpu, td.vcpu.get_debugregs):
            assert error_of(read) == errno.EINVAL


class TestInitVcpu:
    @pytest.fixture
    def vcpu(self, td: TestTd) -> Vcpu:
        td.enable_caps().init_vm()
        return td.create_vcpu(init=False)

    def test_a_stale_error_comes_before_flags_and_id(self, vcpu: Vcpu, td: TestTd) -> None:
        td.set_cpuid(vcpu)
        cmd = KvmTdxCmdV17(INIT_VCPU, 0, 0)
        cmd.error = 1
        assert error_of(lambda: vcpu.ioctl(MEMORY_ENCRYPT_OP, cmd)) == errno.EINVAL
        cmd.error = 0
        assert error_of(lambda: vcpu.ioctl(MEMORY_ENCRYPT_OP, td.read_only_copy(cmd))) == 0, "never written back"

    @pytest.mark.parametrize("leaf", [H.TDH_VP_CREATE, H.TDH_VP_ADDCX, H.TDH_VP_INIT])
    def test_a_module_failure_is_eio_and_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd, leaf: H) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        td.set_cpuid(vcpu)
        seam.fail(leaf, INVALID)
        assert error_of(vcpu.tdx_init_vcpu) == errno.EIO
        assert error_of(vcpu.get_mp_state) == errno.EIO

    def test_vp_init_has_no_x2apic_id(self, seam: ScriptedSeam, vcpu: Vcpu, td: TestTd) -> None:
        versions: list[int] = []

        def spy(lp: int, regs: list[int]) -> None:
            if regs[0] & 0xFFFF == H.TDH_VP_INIT:
                versions.append(regs[0] >> 16)
            seam.execute(lp, regs)

        td.set_cpuid(vcpu)
        seam.hook = spy
        vcpu.tdx_init_vcpu()
        assert versions == [0]

    def test_set_cpuid_has_its_ordinary_checks_first(self, vcpu: Vcpu) -> None:
        broken = [*V17_CONFIGURED, cpuid_entry(0xD, 0, 1, eax=1 << 18), cpuid_entry(7, 0, 1)]
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of(broken))) == errno.EPERM
        del broken[-2]
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of(broken))) == errno.EINVAL


class TestInitMemRegion:
    def add(self, td: TestTd, region: Region) -> int:
        cmd = KvmTdxCmdV17(INIT_MEM_REGION, 0, ctypes.addressof(region))
        return error_of(lambda: td.vm.ioctl(MEMORY_ENCRYPT_OP, cmd))

    def test_before_init_vm_nothing_is_private(self, td: TestTd) -> None:
        td.enable_caps()
        td.create_vcpu(init=False)
        memory = UserMemory(PAGE)
        gmem = td.vm.create_guest_memfd(PAGE)
        td.vm.set_user_memory_region2(0, 0, PAGE, memory.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
        td.vm.set_memory_attributes(0, PAGE, PRIVATE)
        assert self.add(td, Region(memory.hva, 0, 1)) == errno.EINVAL

    @pytest.fixture
    def ready(self, td: TestTd) -> TestTd:
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        return td

    def test_the_source_is_looked_at_before_the_attribute(self, ready: TestTd) -> None:
        ready.vm.set_memory_attributes(0, PAGE, 0)
        memory = UserMemory(PAGE)
        memory.protect(0, PAGE)
        assert self.add(ready, Region(memory.hva, 0, 1)) == errno.EFAULT
        memory.protect(0, PAGE, writable=True)
        assert self.add(ready, Region(memory.hva, 0, 1)) == errno.EIO

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_ADD, H.TDH_MEM_SEPT_ADD])
    def test_a_busy_module_is_asked_for_ever(self, seam: ScriptedSeam, ready: TestTd, leaf: H) -> None:
        seam.fail(leaf, *[0x8000_0200 << 32] * 100)
        assert self.add(ready, Region(UserMemory(PAGE).hva, 0, 1)) == 0

    def test_a_signal_before_the_first_page_is_eintr_and_later_eagain(self, seam: ScriptedSeam, ready: TestTd) -> None:
        previous = signal.signal(signal.SIGUSR1, lambda *_: None)
        source = UserMemory(2 * PAGE)

        def interrupt(lp: int, regs: list[int]) -> None:
            if regs[0] == H.TDH_MEM_PAGE_ADD:
                signal.raise_signal(signal.SIGUSR1)
            seam.execute(lp, regs)

        seam.hook = interrupt
        try:
            region = Region(source.hva, 0, 2)
            assert self.add(ready, region) == errno.EAGAIN
            assert (region.gpa, region.nr_pages) == (PAGE, 1)
        finally:
            seam.hook = None
            signal.signal(signal.SIGUSR1, previous)
        assert self.add(ready, region) == 0


def test_a_page_that_cannot_be_augmented_bugs_the_vm(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().load(3, 0x3000).done())
    seam.fail(H.TDH_MEM_PAGE_AUG, INVALID)
    assert error_of(td.vcpu.run) == errno.EIO
    assert error_of(td.vcpu.get_mp_state) == errno.EIO


class TestAfterRelease:
    def test_a_vcpu_can_be_neither_initialised_nor_may_the_td_be_again(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        td.set_cpuid(vcpu)
        td.vm.tdx_release_vm()
        assert error_of(vcpu.tdx_init_vcpu) == errno.EINVAL
        assert error_of(td.vm.tdx_finalize_vm) == errno.EINVAL
        assert error_of(td.init_vm) == errno.EBUSY, "there is a vCPU"

    def test_private_pages_are_reclaimed_and_no_tlb_is_tracked(self, seam: ScriptedSeam, td: TestTd) -> None:
        td.build(Program().done())
        td.run_to_end()
        seam.calls.clear()
        td.vm.tdx_release_vm()
        leaves = seam.leaves()
        assert leaves[:2] == [H.TDH_VP_FLUSH, H.TDH_MNG_VPFLUSHDONE]
        assert leaves.count(H.TDH_MNG_KEY_FREEID) == 1
        assert not {H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_TRACK, H.TDH_MEM_PAGE_REMOVE} & set(leaves)
        assert leaves.count(H.TDH_PHYMEM_PAGE_RECLAIM) == 16 + 3, "the image, and the Secure EPT"

    @pytest.mark.usefixtures("machine")
    def test_without_vcpus_a_second_td_is_made_and_the_first_forgotten(self) -> None:
        host = boot("v17", oracle=True)
        with TestTd(host) as td:
            td.init_vm()
            first = (td.ops.td.tdr, *td.ops.td.tdcs)
            td.vm.tdx_release_vm()
            td.init_vm()
        assert host.module is not None
        assert host.pages.leaked == set(first)
        assert list(host.module.tdrs) == [first[0]]
        host.shutdown()


def test_the_vm_fd_of_an_ordinary_vm_does_not_read_the_command(td: TestTd) -> None:
    with Kvm(td.machine.kernel()) as kvm, kvm.create_vm(0) as vm:
        assert error_of(lambda: vm.ioctl(MEMORY_ENCRYPT_OP, 0x10)) == errno.ENOTTY


def test_get_td_vmcall_info_gives_all_zeros(td: TestTd) -> None:
    td.build(Program().vmcall(0x10000, 0, 1, 2, 3).report(R10, 11, 12, 13, 14).done())
    assert td.run_to_end() == [0] * 5


def test_a_filtered_msr_is_invalid_and_never_an_exit(td: TestTd) -> None:
    td.vm.enable_cap(188, 7)
    td.build(Program().vmcall(WRMSR, 0xC0000080, 0xD01).report(R10).done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.reported == [1 << 63]

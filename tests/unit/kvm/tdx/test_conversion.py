"""MapGPA, implicit conversion, zaps: private pages become shared and back, and their contents are lost."""

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import R10, R11, RBX, S_BIT, SHARED_ALIAS, TDG_MEM_PAGE_ACCEPT, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import EXIT_HYPERCALL, GPAW48, PRIVATE, X2APIC, TestTd, cpuid_entry
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H

MAP_GPA = 0x10001
RETRY, INVALID_OPERAND, ALIGN_ERROR, UNSUPPORTED = 1, 1 << 63, 1 << 63 | 2, 1 << 63 | 3
BUSY = 0x8000_0200 << 32
HYPERCALL = KvmExit.KVM_EXIT_HYPERCALL
PAGE = 0x1000
MIB = 1 << 20


def map_gpa(gpa: int, size: int) -> Program:
    return Program().vmcall(MAP_GPA, gpa, size).report(R10, R11).done()


def accept(gpa: int) -> Program:
    return Program().tdcall(TDG_MEM_PAGE_ACCEPT, rcx=gpa)


class TestMapGpa:
    @pytest.mark.parametrize(
        ("gpa", "size", "status"),
        [
            (0, 0, INVALID_OPERAND),
            (PAGE, (1 << 64) - PAGE, INVALID_OPERAND),
            (1 << 52, PAGE, INVALID_OPERAND),
            (S_BIT - PAGE, 2 * PAGE, INVALID_OPERAND),
            (1, PAGE, ALIGN_ERROR),
            (PAGE, PAGE + 1, ALIGN_ERROR),
        ],
    )
    def test_bad_ranges_do_not_exit(self, td: TestTd, gpa: int, size: int, status: int) -> None:
        td.build(map_gpa(gpa, size))
        assert td.run_to_end() == [status, gpa]

    def test_without_the_capability_it_is_unsupported(self, td: TestTd) -> None:
        td.enable_caps()
        td.vm.enable_cap(EXIT_HYPERCALL, 0)
        td.init_vm().add_memory()
        td.create_vcpu()
        td.add_image(map_gpa(1, 0)).finalize()
        assert td.run_to_end() == [UNSUPPORTED, 1]

    @pytest.mark.parametrize(
        ("table", "width"),
        [
            ([cpuid_entry(0x80000000, eax=0x80000008), cpuid_entry(0x80000008, eax=GPAW48 | 46)], 46),
            ([cpuid_entry(0x80000000, eax=0x80000007), cpuid_entry(0x80000008, eax=GPAW48 | 46)], 36),
            ([cpuid_entry(0x80000008, eax=GPAW48 | 46)], 36),
            ([], 36),
        ],
    )
    def test_what_the_cpuid_table_does_not_cover_is_illegal(
        self, td: TestTd, table: list[KvmCpuidEntry2], width: int
    ) -> None:
        td.enable_caps().init_vm().add_memory()
        vcpu = td.create_vcpu(init=False)
        vcpu.set_cpuid2(KvmCpuid2.of([cpuid_entry(1, ecx=X2APIC), *table]))
        vcpu.tdx_init_vcpu()
        program = Program()
        for gpa in (S_BIT, 1 << width, (1 << width) - PAGE):
            program.vmcall(MAP_GPA, gpa, PAGE).report(R10)
        td.add_image(program.done()).finalize()
        assert td.run() == HYPERCALL
        assert td.vcpu.kvm_run.hypercall.args[0] == (1 << width) - PAGE
        assert td.reported == [INVALID_OPERAND, INVALID_OPERAND]

    def test_it_comes_in_chunks_of_2_mib(self, td: TestTd) -> None:
        td.build(map_gpa(S_BIT | PAGE, 5 * MIB))
        chunks = []
        while td.run() == HYPERCALL:
            call = td.vcpu.kvm_run.hypercall
            assert (call.nr, call.flags, call.ret) == (12, 1, 0)
            chunks.append(tuple(call.args[:3]))
        assert chunks == [(PAGE, 512, 0), (PAGE + 2 * MIB, 512, 0), (PAGE + 4 * MIB, 256, 0)]
        assert td.reported == [0, MAP_GPA]

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(first=st.integers(0, 1 << 20), pages=st.integers(1, 5000), shared_bit=st.sampled_from([0, S_BIT]))
    def test_the_chunks_cover_the_range_without_gap_or_overlap(
        self, machine: Machine, first: int, pages: int, shared_bit: int
    ) -> None:
        with TestTd(machine) as td:
            td.build(map_gpa(shared_bit | first * PAGE, pages * PAGE))
            expected = first * PAGE
            while td.run() == HYPERCALL:
                gpa, npages, attributes = list(td.vcpu.kvm_run.hypercall.args)[:3]
                assert (gpa, attributes) == (expected, 0 if shared_bit else 16)
                assert npages * PAGE == min(2 * MIB, (first + pages) * PAGE - gpa), "2 MiB from where it begins"
                expected += npages * PAGE
            assert expected == (first + pages) * PAGE
            assert td.reported == [0, MAP_GPA]

    def test_to_private_says_so(self, td: TestTd) -> None:
        td.build(map_gpa(0, PAGE))
        assert td.run() == HYPERCALL
        assert list(td.vcpu.kvm_run.hypercall.args)[:3] == [0, 1, 16]

    @pytest.mark.parametrize(
        ("machine", "ret", "status"),
        [
            ("7.3", errno.EAGAIN, RETRY),
            ("7.3", errno.EINVAL, INVALID_OPERAND),
            ("6.16", errno.EAGAIN, INVALID_OPERAND),
            ("6.16", 999, INVALID_OPERAND),
        ],
        indirect=["machine"],
    )
    def test_a_refusal_names_the_chunk_that_failed(self, td: TestTd, ret: int, status: int) -> None:
        td.build(map_gpa(S_BIT | PAGE, 3 * MIB))
        assert td.run() == HYPERCALL
        assert td.run() == HYPERCALL
        td.vcpu.kvm_run.hypercall.ret = ret
        assert td.run_to_end() == [status, S_BIT | (PAGE + 2 * MIB)]

    def test_another_answer_is_einval_and_the_call_is_lost(self, td: TestTd) -> None:
        td.build(map_gpa(S_BIT, PAGE))
        assert td.run() == HYPERCALL
        td.vcpu.kvm_run.hypercall.ret = 1
        with pytest.raises(KvmError) as raised:
            td.vcpu.run()
        assert raised.value.errno == errno.EINVAL
        assert td.run_to_end()[0] == 0

    def test_the_next_chunk_comes_even_with_immediate_exit(self, td: TestTd) -> None:
        td.build(map_gpa(S_BIT, 3 * MIB))
        assert td.run() == HYPERCALL
        td.vcpu.kvm_run.immediate_exit = 1
        assert td.run() == HYPERCALL
        assert td.vcpu.kvm_run.hypercall.args[0] == 2 * MIB
        with pytest.raises(KvmError) as raised:
            td.run()
        assert raised.value.errno == errno.EINTR

    def test_a_pending_event_between_chunks_makes_the_guest_ask_again(self, td: TestTd) -> None:
        td.build(map_gpa(S_BIT, 3 * MIB))
        assert td.run() == HYPERCALL
        ops = td.machine.host.vms[-1].ops
        ops.deliver_interrupt(td.machine.host.vms[-1].vcpus[0], 0x41)
        assert td.run_to_end() == [RETRY, S_BIT | 2 * MIB]

    def test_so_does_a_pending_nmi(self, td: TestTd) -> None:
        td.build(map_gpa(0, 3 * MIB))
        assert td.run() == HYPERCALL
        td.vcpu.nmi()
        assert td.run_to_end() == [RETRY, 2 * MIB]

    def test_after_the_last_chunk_nobody_looks_for_events(self, td: TestTd) -> None:
        td.build(map_gpa(0, 2 * MIB))
        assert td.run() == HYPERCALL
        td.vcpu.nmi()
        assert td.run_to_end() == [0, MAP_GPA]


class TestSharing:
    def test_host_and_guest_see_the_same_shared_page(self, td: TestTd) -> None:
        td.low.write(b"fromhost", 0x7000)
        td.build(
            Program()
            .vmcall(MAP_GPA, S_BIT | 0x7000, PAGE)
            .load(RBX, SHARED_ALIAS + 0x7000)
            .report(RBX)
            .store(SHARED_ALIAS + 0x7008, int.from_bytes(b"fromtd!!", "little"))
            .done()
        )
        assert td.run() == HYPERCALL
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        (seen,) = td.run_to_end()
        assert seen.to_bytes(8, "little") == b"fromhost"
        assert td.low.read(0x7008, 8) == b"fromtd!!"

    def test_the_host_does_not_see_private_memory_through_its_hva(self, td: TestTd) -> None:
        td.build(accept(0x7000).store(0x7000, 0x5EC2E7).load(RBX, 0x7000).report(RBX).done())
        assert td.run_to_end() == [0x5EC2E7]
        assert td.low.read(0x7000, PAGE) == bytes(PAGE)

    def test_a_page_that_went_to_shared_and_back_reads_zero_and_must_be_accepted(self, td: TestTd) -> None:
        program = accept(0x7000).store(0x7000, 0x1111)
        program.vmcall(MAP_GPA, S_BIT | 0x7000, PAGE).store(SHARED_ALIAS + 0x7000, 0x2222)
        program.vmcall(MAP_GPA, 0x7000, PAGE).raw(accept(0x7000).code).load(RBX, 0x7000).report(RBX).done()
        td.build(program)
        assert td.run() == HYPERCALL
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        assert td.run() == HYPERCALL
        assert int.from_bytes(td.low.read(0x7000, 8), "little") == 0x2222
        td.vm.set_memory_attributes(0x7000, PAGE, PRIVATE)
        assert td.run_to_end() == [0]

    def test_implicit_conversion_works_by_memory_faults(self, td: TestTd) -> None:
        td.build(accept(0x9000).store(0x9000, 1).store(SHARED_ALIAS + 0x9000, 0x77).done())
        with pytest.raises(KvmError) as raised:
            td.run()
        assert raised.value.errno == errno.EFAULT
        fault = td.vcpu.kvm_run.memory_fault
        assert (fault.flags, fault.gpa) == (0, 0x9000)
        td.vm.set_memory_attributes(fault.gpa, fault.size, 0)
        td.run_to_end()
        assert td.low.read(0x9000, 1) == b"\x77"

    def test_unmapping_shared_memory_reaches_the_guests_tlb(self, td: TestTd) -> None:
        program = Program().load(RBX, SHARED_ALIAS + 0x7000).out(0x40, 1).load(RBX, SHARED_ALIAS + 0x7000).done()
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        td.add_image(program).finalize()
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        assert td.run() == KvmExit.KVM_EXIT_IO
        td.vm.set_memory_attributes(0x7000, PAGE, PRIVATE)
        with pytest.raises(KvmError) as raised:
            td.run()
        assert raised.value.errno == errno.EFAULT
        assert td.vcpu.kvm_run.memory_fault.gpa == 0x7000


class TestZaps:
    def mapped(self, td: TestTd, seam: ScriptedSeam) -> None:
        td.build(accept(0x7000).store(0x7000, 0x1234).out(0x40, 1).load(RBX, 0x7000).report(RBX).done())
        assert td.run() == KvmExit.KVM_EXIT_IO
        seam.calls.clear()

    def test_a_running_tds_page_is_blocked_tracked_removed_and_flushed(self, seam: ScriptedSeam, td: TestTd) -> None:
        self.mapped(td, seam)
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        assert seam.leaves() == [
            H.TDH_MEM_RANGE_BLOCK,
            H.TDH_MEM_TRACK,
            H.TDH_MEM_PAGE_REMOVE,
            H.TDH_PHYMEM_PAGE_WBINVD,
        ]
        assert seam.calls[0].rcx == 0x7000

    def test_before_finalize_there_is_nothing_to_track(self, seam: ScriptedSeam, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        td.add_image(Program().done())
        seam.calls.clear()
        td.gmem0.punch_hole(0, PAGE)
        assert seam.leaves() == [H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_PAGE_REMOVE, H.TDH_PHYMEM_PAGE_WBINVD]

    @pytest.mark.parametrize("how", ["attribute", "hole", "slot", "close"])
    def test_every_trigger_zaps_the_page_once(self, seam: ScriptedSeam, td: TestTd, how: str) -> None:
        self.mapped(td, seam)
        if how == "attribute":
            td.vm.set_memory_attributes(0x7000, PAGE, 0)
        elif how == "hole":
            td.gmem1.punch_hole(0x7000, PAGE)
        elif how == "slot":
            td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        else:
            td.gmem1.close()
        assert seam.leaves().count(H.TDH_MEM_PAGE_REMOVE) == 1

    def test_a_slot_takes_only_its_own_pages(self, seam: ScriptedSeam, td: TestTd) -> None:
        self.mapped(td, seam)
        td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        assert {call.rcx for call in seam.calls if call.leaf == H.TDH_MEM_RANGE_BLOCK} == {0x7000}

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_TRACK, H.TDH_MEM_PAGE_REMOVE])
    def test_busy_is_retried_once(self, seam: ScriptedSeam, td: TestTd, leaf: H) -> None:
        self.mapped(td, seam)
        seam.fail(leaf, BUSY)
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        assert seam.leaves().count(leaf) == 2
        assert td.vm.check_extension(66)

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_TRACK, H.TDH_MEM_PAGE_REMOVE])
    @pytest.mark.parametrize("machine", ["7.3 of its own"], indirect=True)
    def test_busy_twice_bugs_the_vm_and_the_page_is_never_reused(
        self, seam: ScriptedSeam, td: TestTd, leaf: H, machine: Machine
    ) -> None:
        self.mapped(td, seam)
        seam.fail(leaf, BUSY, BUSY)
        td.vm.set_memory_attributes(0x7000, PAGE, 0)
        with pytest.raises(KvmError) as raised:
            td.vm.check_extension(66)
        assert raised.value.errno == errno.EIO
        td.close()
        leaked = machine.pages.leaked
        assert len(leaked) == 2, "the page, and the TDR, which still has a child"
        assert machine.pages.in_use == len(leaked)

    def test_tables_stay_until_the_key_id_is_gone(self, seam: ScriptedSeam, td: TestTd) -> None:
        self.mapped(td, seam)
        for slot, memory in ((0, td.image_source), (1, td.low)):
            td.vm.set_user_memory_region2(slot, 0, 0, memory.hva)
        assert seam.leaves().count(H.TDH_MEM_PAGE_REMOVE) == 17
        assert H.TDH_PHYMEM_PAGE_RECLAIM not in seam.leaves()
        td.close()
        leaves = seam.leaves()
        assert leaves.index(H.TDH_PHYMEM_PAGE_RECLAIM) > leaves.index(H.TDH_MNG_KEY_FREEID)

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_AUG, H.TDH_MEM_SEPT_ADD])
    def test_busy_while_mapping_is_invisible(self, seam: ScriptedSeam, td: TestTd, leaf: H) -> None:
        td.build(accept(0x7000).store(0x7000, 0x1234).load(RBX, 0x7000).report(RBX).done())
        seam.fail(leaf, *[BUSY] * 200)
        assert td.run_to_end() == [0x1234]

    def test_aug_failing_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd) -> None:
        td.build(accept(0x7000).done())
        seam.fail(H.TDH_MEM_PAGE_AUG, 0xC000_0100 << 32)
        with pytest.raises(KvmError) as raised:
            td.run()
        assert raised.value.errno == errno.EIO


class TestPreFault:
    def region(self, td: TestTd, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
        """Return errno (0: success) and what the structure says afterwards."""
        region = KvmPreFaultMemory(gpa, size, flags)
        error = 0
        try:
            td.vcpu.pre_fault_memory(region)
        except KvmError as failure:
            error = failure.errno or 0
        return error, region.gpa, region.size

    def test_private_pages_are_mapped_and_stay_pending(self, seam: ScriptedSeam, td: TestTd) -> None:
        td.build(accept(0x7000).load(RBX, 0x7000).report(RBX).done())
        seam.calls.clear()
        assert self.region(td, 0x7000, 2 * PAGE) == (0, 0x9000, 0)
        assert seam.leaves().count(H.TDH_MEM_PAGE_AUG) == 2
        assert td.run_to_end() == [0]
        assert seam.leaves().count(H.TDH_MEM_PAGE_AUG) == 2, "the guest did not fault"

    def test_before_finalize_is_not_supported(self, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        assert self.region(td, 0x7000, PAGE) == (errno.EOPNOTSUPP, 0x7000, PAGE)

    @pytest.mark.parametrize(
        ("gpa", "size", "flags", "expected"),
        [
            (0, PAGE, 1, errno.EINVAL),
            (1, PAGE, 0, errno.EINVAL),
            (0, 0, 0, errno.EINVAL),
            (S_BIT, PAGE, 0, errno.EINVAL),
        ],
    )
    def test_bad_arguments(self, td: TestTd, gpa: int, size: int, flags: int, expected: int) -> None:
        td.build(Program().done())
        assert self.region(td, gpa, size, flags) == (expected, gpa, size)

    def test_private_without_a_slot_is_efault_with_a_memory_fault(self, td: TestTd) -> None:
        td.build(Program().done())
        td.vm.set_memory_attributes(0x4000_0000, PAGE, PRIVATE)
        assert self.region(td, 0x4000_0000, PAGE)[0] == errno.EFAULT
        assert td.vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT

    def test_shared_without_a_slot_is_enoent(self, td: TestTd) -> None:
        td.build(Program().done())
        assert self.region(td, 0x4000_0000, PAGE)[0] == errno.ENOENT

    def test_progress_is_success(self, td: TestTd) -> None:
        td.build(Program().done())
        assert self.region(td, 0x1F_F000, 4 * PAGE) == (0, 0x20_0000, 3 * PAGE)

    def test_a_vcpu_that_was_never_initialised_bugs_the_vm(self, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        other = td.create_vcpu(1, init=False)
        td.finalize()
        with pytest.raises(KvmError) as raised:
            other.pre_fault_memory(KvmPreFaultMemory(0x7000, PAGE))
        assert raised.value.errno == errno.EIO
        with pytest.raises(KvmError):
            td.vm.check_extension(66)

"""Every fault: what user space sees of it, and that nothing leaks, or exactly what has to."""

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sim_backend.faults import FAULTS, FaultError, Undo, parse
from sim_backend.hw.gprs import RAX, RCX, new_gprs
from sim_backend.machine import Machine, boot
from sim_backend.tdx_module.invariants import check_invariants
from tests.unit.kvm.tdx.guest_code import IMAGE_BYTES, IMAGE_GPA, Program
from tests.unit.kvm.tdx.vmm import MEASURE, PRIVATE, TestTd
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion
from uapi_ctypes.tdx_status import Operand, Rax, Status

ALL = ("7.3", "6.16", "v17")


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = boot(getattr(request, "param", "7.3"), oracle=True, faults=[])
    yield machine
    machine.shutdown()


def on(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("machine", profiles, indirect=True)


def inject(machine: Machine, fault: str) -> Undo:
    assert machine.faults is not None
    return machine.faults.inject(fault)


def answered(machine: Machine, leaf: str) -> int:
    assert machine.faults is not None
    return machine.faults.seam.answered[leaf]


def refusal(call: Callable[[], Any]) -> tuple[int, int]:
    """Return errno and hw_error of a call that fails."""
    with pytest.raises(KvmError) as failure:
        call()
    return failure.value.errno or 0, failure.value.hw_error


def is_dead(td: TestTd) -> bool:
    """Tell whether the VM is bugged: every ioctl is EIO."""
    try:
        td.vm.check_extension(0)
    except KvmError as error:
        return error.errno == errno.EIO
    return False


def region(td: TestTd, pages: int = 16) -> KvmTdxInitMemRegion:
    return KvmTdxInitMemRegion(td.image_source.hva, IMAGE_GPA, pages)


def with_memory(machine: Machine) -> TestTd:
    """Return a TD that is ready for its first page."""
    td = TestTd(machine).enable_caps().init_vm().add_memory()
    td.create_vcpu()
    return td


# ---- names and parameters -----------------------------------------------------------------------------------


def test_an_unknown_fault_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(FaultError, match=r"no fault is called 'lose-lock-rac'.*lose-lock-race.*out-of-hkids.*dead-cpu"):
        boot("7.3", faults=["lose-lock-rac"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out-of-hkids:rest=1", "out-of-hkids has no parameter 'rest'; it has: left"),
        ("lose-lock-race", "lose-lock-race needs leaf"),
        ("out-of-memory:left=few", "left='few' is no number"),
        ("lose-lock-race:leaf=TDH_MEM_TRUCK", "no SEAMCALL leaf is called 'TDH_MEM_TRUCK'"),
        ("lose-lock-race:leaf=TDH_MEM_TRACK,operand=SOMETHING", "no operand is called 'SOMETHING'"),
        ("lose-lock-race:leaf=TDH_MEM_TRACK,times=0", "times=0 must be at least 1"),
        ("lose-lock-race:leaf=TDH_MEM_TRACK,probability=2", "probability=2.0"),
        ("dead-cpu:package=7", "the host has 2 package"),
    ],
)
def test_a_fault_that_makes_no_sense_says_what_would(machine: Machine, text: str, message: str) -> None:
    with pytest.raises(FaultError, match=message.replace("(", r"\(")):
        inject(machine, text)


def test_a_host_without_tdx_has_no_faults() -> None:
    with pytest.raises(FaultError, match="pvm has no TDX module"):
        boot("pvm", faults=["out-of-memory"])


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_says_what_it_is_and_can_be_taken_back(machine: Machine, name: str) -> None:
    undo = inject(machine, f"{name}:leaf=TDH_MNG_INIT" if name == "lose-lock-race" else name)
    undo()
    with TestTd(machine) as td:
        td.build(Program().done())
        assert td.run_to_end() == []
        td.vm.set_memory_attributes(0, 0x20_0000, 0)
    assert machine.leftovers() == []
    assert (FAULTS[name].__doc__ or "").strip().endswith((".", ")."))


def test_parameters_come_as_the_types_that_they_are() -> None:
    assert parse("lose-lock-race:leaf=TDH.MEM.TRACK,times=0x10,probability=0.5") == FAULTS["lose-lock-race"](
        leaf="TDH.MEM.TRACK", times=16, probability=0.5
    )  # type: ignore[call-arg]


def test_the_same_seed_loses_the_same_races() -> None:
    def statuses(seed: int) -> list[int]:
        machine = boot("7.3", faults=[f"lose-lock-race:leaf=TDH_SYS_RD,times=99,probability=0.4,seed={seed}"])
        try:
            assert machine.faults is not None
            found = []
            for _ in range(64):
                regs = new_gprs()
                regs[RAX] = SeamcallLeaf.TDH_SYS_RD
                machine.faults.seam.seamcall(0, regs)
                found.append(regs[RAX] >> 32)
            return found
        finally:
            machine.shutdown()

    first = statuses(1)
    assert statuses(1) == first
    assert statuses(2) != first
    assert 10 < first.count(Status.OPERAND_BUSY) < 45


def test_a_leaf_that_loses_a_race_changes_nothing(machine: Machine) -> None:
    assert machine.module is not None
    assert machine.faults is not None
    with TestTd(machine) as td:
        td.build(Program().done())
        tdr = next(iter(machine.module.tdrs.values()))
        before = (tdr.tdcs.td_epoch, bytes(machine.memory.b[tdr.tdcs.sept_root : tdr.tdcs.sept_root + 4096]))
        inject(machine, "lose-lock-race:leaf=TDH_MEM_TRACK,operand=TD_EPOCH")
        regs = new_gprs()
        regs[RAX], regs[RCX] = SeamcallLeaf.TDH_MEM_TRACK, tdr.hpa
        machine.faults.seam.seamcall(0, regs)

        assert Rax.decode(regs[RAX]) == Rax(Status.OPERAND_BUSY, Operand.TD_EPOCH)
        assert regs[RCX] == tdr.hpa
        assert (tdr.tdcs.td_epoch, bytes(machine.memory.b[tdr.tdcs.sept_root : tdr.tdcs.sept_root + 4096])) == before
        check_invariants(machine.module)
    assert machine.leftovers() == []


# ---- KVM_TDX_INIT_VM ----------------------------------------------------------------------------------------


@on(*ALL)
def test_no_hkid_left_is_enospc_and_the_vm_can_try_again(machine: Machine) -> None:
    undo = inject(machine, "out-of-hkids:left=1")
    with TestTd(machine) as first, TestTd(machine) as second:
        first.enable_caps().init_vm()
        second.enable_caps()
        assert refusal(second.init_vm) == (errno.ENOSPC, 0)
        undo()
        second.init_vm()
        second.create_vcpu()
        second.finalize()
    assert machine.leftovers() == []


@on("7.3", "6.16")
def test_a_control_group_that_may_have_no_more_tds_is_ebusy(machine: Machine) -> None:
    inject(machine, "misc-cgroup-limit:left=1")
    with TestTd(machine) as first, TestTd(machine) as second:
        first.enable_caps().init_vm()
        free = machine.free_hkids
        assert refusal(second.init_vm) == (errno.EBUSY, 0)
        assert machine.free_hkids == free
        first.close()
        second.init_vm()
    assert machine.leftovers() == []


def test_no_hkid_comes_before_the_control_group(machine: Machine) -> None:
    inject(machine, "misc-cgroup-limit")
    undo = inject(machine, "out-of-hkids")
    with TestTd(machine) as td:
        assert refusal(td.init_vm) == (errno.ENOSPC, 0)
        undo()
        assert refusal(td.init_vm) == (errno.EBUSY, 0)


def test_an_hkid_comes_back_when_its_td_is_gone(machine: Machine) -> None:
    inject(machine, "out-of-hkids:left=1")
    for _ in range(3):
        with TestTd(machine) as td:
            td.enable_caps().init_vm()
    assert machine.leftovers() == []


@on("7.3", "6.16")
@pytest.mark.parametrize("fault", ["no-entropy", "no-entropy:reads=10,leaf=TDH_MNG_ADDCX"])
def test_no_entropy_is_eagain_and_the_same_vm_can_try_again(machine: Machine, fault: str) -> None:
    undo = inject(machine, fault)
    with TestTd(machine) as td:
        td.enable_caps()
        assert refusal(td.init_vm) == (errno.EAGAIN, 0)
        assert not is_dead(td)
        assert machine.pages.in_use == 0
        undo()
        td.init_vm()
    assert machine.leftovers() == []


@on("v17")
def test_no_entropy_is_eio_in_v17_which_bugs_nothing(machine: Machine) -> None:
    undo = inject(machine, "no-entropy")
    with TestTd(machine) as td:
        td.enable_caps()
        assert refusal(td.init_vm) == (errno.EIO, 0)
        undo()
        td.init_vm()
    assert machine.leftovers() == []


@on(*ALL)
def test_the_seamcall_wrapper_hides_a_short_lack_of_entropy(machine: Machine) -> None:
    inject(machine, "no-entropy:reads=40")  # TDH.MNG.CREATE gives up after 3, and is tried ten times
    with TestTd(machine) as td:
        td.enable_caps().init_vm()
        assert machine.platform.rand_fail == 0
    assert machine.leftovers() == []


@on("7.3", "6.16")
@pytest.mark.parametrize("fault", ["key-generation-failed", "pconfig-busy"])
def test_a_key_that_cannot_be_programmed_is_eio_and_the_end_of_the_vm(machine: Machine, fault: str) -> None:
    inject(machine, fault)
    with TestTd(machine) as td:
        td.enable_caps()
        assert refusal(td.init_vm) == (errno.EIO, 0)
        assert is_dead(td)
    assert machine.leftovers() == []


@on("v17")
def test_v17_asks_for_a_key_until_there_is_one(machine: Machine) -> None:
    inject(machine, "key-generation-failed:times=50")
    with TestTd(machine) as td:
        td.enable_caps().init_vm()
        assert answered(machine, "TDH_MNG_KEY_CONFIG") == 50
    assert machine.leftovers() == []


@on("v17")
def test_a_busy_key_table_is_eio_in_v17_and_the_vm_can_try_again(machine: Machine) -> None:
    inject(machine, "pconfig-busy")
    with TestTd(machine) as td:
        td.enable_caps()
        assert refusal(td.init_vm) == (errno.EIO, 0)
        td.init_vm()
    assert machine.leftovers() == []


@on(*ALL)
def test_a_package_without_a_cpu_is_eio_and_the_vm_can_try_again(machine: Machine) -> None:
    undo = inject(machine, "dead-cpu:package=1")
    with TestTd(machine) as td:
        td.enable_caps()
        assert refusal(td.init_vm) == (errno.EIO, 0)
        assert not is_dead(td)
        undo()
        td.init_vm()
        with pytest.raises(FaultError, match="cannot be switched off while a TD has a key"):
            inject(machine, "dead-cpu")
    assert machine.leftovers() == []


@on("7.3", "6.16")
@pytest.mark.parametrize("left", range(8))
def test_init_vm_without_memory_is_enomem_wherever_it_runs_out(machine: Machine, left: int) -> None:
    undo = inject(machine, f"out-of-memory:left={left}")
    with TestTd(machine) as td:
        td.enable_caps()
        assert machine.tdx is not None
        if left < 1 + machine.tdx.sysinfo.tdcs_pages + 1:
            assert refusal(td.init_vm) == (errno.ENOMEM, 0)
            assert machine.pages.in_use == 0
            undo()
        td.init_vm()
    assert machine.leftovers() == []


@on("v17")
def test_v17_returns_the_key_id_where_it_means_enomem(machine: Machine) -> None:
    undo = inject(machine, "out-of-memory")
    with TestTd(machine) as td:
        td.enable_caps()
        td.init_vm()  # "succeeds": user space that only looks for negative results is deceived
        assert machine.pages.in_use == 0
        assert refusal(td.finalize) == (errno.EINVAL, 0)
        undo()
        td.init_vm()
    assert machine.leftovers() == []


# ---- vCPUs and memory ---------------------------------------------------------------------------------------


@on(*ALL)
def test_init_vcpu_without_memory_is_enomem_and_can_be_tried_again(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        td.set_cpuid(vcpu)
        undo = inject(machine, "out-of-memory:left=2")
        assert refusal(vcpu.tdx_init_vcpu) == (errno.ENOMEM, 0)
        undo()
        vcpu.tdx_init_vcpu()
        td.finalize()
    assert machine.leftovers() == []


@on(*ALL)
def test_create_vcpu_without_memory_is_enomem_and_can_be_tried_again(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.enable_caps().init_vm()
        undo = inject(machine, "out-of-memory")
        assert refusal(lambda: td.vm.create_vcpu(0)) == (errno.ENOMEM, 0)
        undo()
        td.create_vcpu()
        td.finalize()
    assert machine.leftovers() == []


@on("7.3")
@pytest.mark.parametrize("left", [0, 1, 4, 5, 8])
def test_a_region_that_does_not_fit_stops_where_memory_ends_and_goes_on_later(machine: Machine, left: int) -> None:
    with with_memory(machine) as td:
        undo = inject(machine, f"out-of-memory:left={left}")
        wanted = region(td)
        assert refusal(lambda: td.vcpu.tdx_init_mem_region(wanted, MEASURE)) == (errno.ENOMEM, 0)
        assert not is_dead(td)
        done = 16 - wanted.nr_pages
        assert done == max(0, left - 4)  # the root of the shared EPT and three Secure EPT tables come first
        assert wanted.gpa == IMAGE_GPA + done * 4096
        undo()
        td.vcpu.tdx_init_mem_region(wanted, MEASURE)
        assert wanted.nr_pages == 0
    assert machine.leftovers() == []


@on("7.3", "6.16", "v17")
def test_a_busy_sept_lock_in_sept_add_is_never_seen(machine: Machine) -> None:
    inject(machine, "lose-lock-race:leaf=TDH_MEM_SEPT_ADD,times=5")
    with TestTd(machine) as td:
        td.build(Program().done())
        assert answered(machine, "TDH_MEM_SEPT_ADD") == 5
        assert td.run_to_end() == []
    assert machine.leftovers() == []


@on("7.3", "v17")
def test_a_busy_page_add_is_retried_by_kvm(machine: Machine) -> None:
    inject(machine, "lose-lock-race:leaf=TDH_MEM_PAGE_ADD,times=5")
    with TestTd(machine) as td:
        td.build(Program().done())
        assert answered(machine, "TDH_MEM_PAGE_ADD") == 5
    assert machine.leftovers() == []


@on("6.16")
def test_a_busy_page_add_is_ebusy_in_6_16_and_finalize_remembers(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MEM_PAGE_ADD")
        wanted = region(td)
        assert refusal(lambda: td.vcpu.tdx_init_mem_region(wanted, MEASURE)) == (errno.EBUSY, 0)
        assert wanted.nr_pages == 16
        assert refusal(td.finalize) == (errno.EINVAL, 0)
        td.vcpu.tdx_init_mem_region(wanted, MEASURE)
        td.finalize()
    assert machine.leftovers() == []


@on("7.3")
def test_a_failing_extension_is_eio_and_the_end_of_the_vm(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MR_EXTEND")
        assert refusal(lambda: td.vcpu.tdx_init_mem_region(region(td), MEASURE)) == (errno.EIO, 0)
        assert is_dead(td)
    assert machine.leftovers() == []


@on("6.16")
def test_a_failing_extension_is_eio_in_6_16_and_the_vm_lives(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MR_EXTEND")
        assert refusal(lambda: td.vcpu.tdx_init_mem_region(region(td), MEASURE)) == (errno.EIO, 0)
        assert not is_dead(td)
    assert machine.leftovers() == []


@on("v17")
def test_a_failing_extension_is_efault_in_v17_and_the_end_of_the_vm(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MR_EXTEND")
        assert refusal(lambda: td.vcpu.tdx_init_mem_region(region(td), MEASURE)) == (errno.EFAULT, 0)
        assert is_dead(td)
    assert machine.leftovers() == []


@on("7.3", "6.16")
def test_a_busy_finalize_is_ebusy_with_the_status_and_can_be_tried_again(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MR_FINALIZE,operand=OP_STATE")
        assert refusal(td.finalize) == (errno.EBUSY, int(Rax(Status.OPERAND_BUSY, Operand.OP_STATE)))
        td.finalize()
    assert machine.leftovers() == []


@on("v17")
def test_a_busy_finalize_is_eio_in_v17_without_the_status(machine: Machine) -> None:
    with with_memory(machine) as td:
        inject(machine, "lose-lock-race:leaf=TDH_MR_FINALIZE,operand=OP_STATE")
        assert refusal(td.finalize) == (errno.EIO, 0)
        td.finalize()
    assert machine.leftovers() == []


# ---- faults and zaps of a running TD ------------------------------------------------------------------------


@on(*ALL)
def test_a_busy_vp_enter_is_never_seen(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().out(0x40, 1).done())
        inject(machine, "vp-enter-busy:times=7")
        td.run()
        assert td.vcpu.kvm_run.io.port == 0x40
        assert answered(machine, "TDH_VP_ENTER") == 7
    assert machine.leftovers() == []


@on("7.3", "6.16")
def test_a_busy_page_aug_is_never_seen(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, "lose-lock-race:leaf=TDH_MEM_PAGE_AUG,times=200")  # more than one visit to the fault handler
        wanted = KvmPreFaultMemory(0, 0x2000)
        td.vcpu.pre_fault_memory(wanted)
        assert wanted.size == 0
        assert answered(machine, "TDH_MEM_PAGE_AUG") == 200
    assert machine.leftovers() == []


@on("7.3", "6.16")
def test_pre_fault_without_memory_is_enomem_and_keeps_what_it_has(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        td.vcpu.pre_fault_memory(KvmPreFaultMemory(0, 0x1000))
        undo = inject(machine, "out-of-memory:left=2")
        wanted = KvmPreFaultMemory(0, 0x8000)
        td.vcpu.pre_fault_memory(wanted)  # some progress is success
        assert (wanted.gpa, wanted.size) == (0x3000, 0x5000)
        assert refusal(lambda: td.vcpu.pre_fault_memory(wanted)) == (errno.ENOMEM, 0)
        undo()
        td.vcpu.pre_fault_memory(wanted)
        assert wanted.size == 0
    assert machine.leftovers() == []


ZAP_LEAVES = ("TDH_MEM_RANGE_BLOCK", "TDH_MEM_TRACK", "TDH_MEM_PAGE_REMOVE")


@on("7.3", "6.16")
@pytest.mark.parametrize("leaf", ZAP_LEAVES)
def test_one_lost_race_while_zapping_is_never_seen(machine: Machine, leaf: str) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, f"lose-lock-race:leaf={leaf}")
        td.vm.set_memory_attributes(IMAGE_GPA, 0x1000, 0)
        assert answered(machine, leaf) == 1
        assert not is_dead(td)
    assert machine.leftovers() == []


@on("7.3", "6.16")
@pytest.mark.parametrize("leaf", ["TDH_MEM_RANGE_BLOCK", "TDH_MEM_PAGE_REMOVE"])
def test_a_page_that_stays_busy_ends_the_vm_and_is_leaked(machine: Machine, leaf: str) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, f"lose-lock-race:leaf={leaf},times=2")
        td.vm.set_memory_attributes(IMAGE_GPA, 0x1000, 0)  # the zap cannot fail; the VM is bugged
        assert is_dead(td)
        assert len(machine.pages.leaked) == 1
    # The TDR goes last, and the module keeps it while a page is left.
    assert machine.leftovers() == ["2 host pages", "1 TDs in the TDX module"]


@on("7.3", "6.16")
def test_a_tlb_epoch_that_stays_busy_ends_the_vm_and_leaks_the_page_that_the_module_will_not_remove(
    machine: Machine,
) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, "previous-tlb-epoch-busy")
        td.vm.set_memory_attributes(IMAGE_GPA, 0x1000, 0)
        assert is_dead(td)
        assert len(machine.pages.leaked) == 1
    assert machine.leftovers() == ["2 host pages", "1 TDs in the TDX module"]


@on("7.3")
def test_a_race_lost_at_random_never_shows_in_a_whole_run(machine: Machine) -> None:
    for leaf in ("TDH_MEM_PAGE_AUG", "TDH_MEM_SEPT_ADD", "TDH_MEM_PAGE_ADD", "TDH_VP_ENTER"):
        inject(machine, f"lose-lock-race:leaf={leaf},times=1000,probability=0.3,seed=7")
    with TestTd(machine) as td:
        td.build(Program().done())
        td.run_to_end()
        td.vcpu.pre_fault_memory(KvmPreFaultMemory(0, 0x4_0000))
        td.vm.set_memory_attributes(0, 0x20_0000, 0)
        td.vm.set_memory_attributes(0, 0x20_0000, PRIVATE)
    assert machine.leftovers() == []
    assert answered(machine, "TDH_MEM_PAGE_AUG") > 5
    assert answered(machine, "TDH_MEM_PAGE_ADD") > IMAGE_BYTES // 4096 // 8


# ---- the end ------------------------------------------------------------------------------------------------


@on(*ALL)
def test_an_interrupted_cache_flush_is_resumed_and_nothing_is_left(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, "interrupted-wbinvd:times=3")
    assert answered(machine, "TDH_PHYMEM_CACHE_WB") == 3
    assert machine.leftovers() == []


@on("7.3", "6.16")
def test_an_unflushed_vcpu_leaks_the_hkid_and_every_control_page(machine: Machine) -> None:
    assert machine.tdx is not None
    free = machine.free_hkids
    with TestTd(machine) as td:
        td.build(Program().done())
        control_pages = 1 + machine.tdx.sysinfo.tdcs_pages + machine.tdx.sysinfo.tdvps_pages
        mirror = machine.host.vms[-1].ops.td.mirror  # type: ignore[attr-defined]
        control_pages += sum(len(level) for level in mirror.tables)
        inject(machine, "flushvp-not-done")
    assert machine.leftovers() == [
        f"{control_pages} host pages",
        "1 HKIDs",
        "1 TDs in the TDX module",
        "1 vCPUs in the TDX module",
    ]
    assert machine.free_hkids == free - 1
    assert len(machine.tdx.hkids.leaked) == 1
    with TestTd(machine) as td:  # the host goes on
        td.build(Program().done())
        td.run_to_end()


@on("v17")
def test_v17_waits_until_every_vcpu_is_flushed(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, "flushvp-not-done:times=9")
    assert answered(machine, "TDH_MNG_VPFLUSHDONE") == 9
    assert machine.leftovers() == []


@on(*ALL)
def test_a_key_that_the_module_keeps_is_leaked(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.build(Program().done())
        inject(machine, "lose-lock-race:leaf=TDH_MNG_KEY_FREEID,operand=KOT")
    assert machine.tdx is not None
    assert len(machine.tdx.hkids.leaked) == 1
    assert "1 HKIDs" in machine.leftovers()


@on("7.3")
def test_ordinary_vms_do_not_notice(machine: Machine) -> None:
    for name in FAULTS:
        if name not in ("lose-lock-race", "out-of-memory", "dead-cpu"):
            inject(machine, name)
    with Kvm(machine.kernel()) as kvm, kvm.create_vm() as vm:
        vm.create_vcpu(0)
    assert machine.leftovers() == []

"""TDH.VP.ENTER: what may stop it, what the guest finds, and TDG.VP.VMCALL back and forth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.gprs import GPR_NAMES, R8, R9, RAX, RBP, RBX, RCX, RDX, RSI, RSP
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile
from sim_backend.tdx_module.td_vmcs import INTERRUPTIBILITY
from sim_backend.tdx_module.tdvps import VcpuState
from tests.unit.tdx_module.guest_side import FREE_GPA, GPA, TDCALL_BYTES, VE, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

ENTER = SeamcallLeaf.TDH_VP_ENTER
HINT = 1 << 52
RESUME_L1 = 1 << 53
VMCALL_EXIT = Rax(Status.SUCCESS, 77)
IA32_TSC_ADJUST = 0x3B
NOTIFY_ENABLES = 0x9110_0003_0000_0010
IA32_MISC_ENABLE = 0x1A0
PASSED = [index for index in range(2, 16) if index != RSP]


@pytest.fixture
def idle(host: SeamcallHost) -> Guest:
    return Guest(host, enter=False)


def test_a_new_vcpu_starts_with_the_registers_of_the_spec(idle: Guest) -> None:
    assert idle.seamcall(ENTER, rcx=idle.tdvpr) is None
    gprs = idle.cpu.gprs
    expected = {RCX: 0xABCD, R8: 0xABCD, RBX: 48, RDX: 0x806F8, RSI: 0}
    assert {index: gprs[index] for index in expected} == expected
    assert gprs[RAX] == gprs[R9] == 0
    assert (idle.cpu.rip, idle.cpu.state.efer & 1 << 10) == (0xFFFF_FFF0, 0)


@pytest.mark.parametrize("bit", [0, 11, 54, 63])
def test_reserved_bits_of_rcx_are_refused(idle: Guest, bit: int) -> None:
    assert idle.seamcall(ENTER, rcx=idle.tdvpr | 1 << bit) == Rax(Status.OPERAND_INVALID, Operand.RCX)


@pytest.mark.parametrize("hint", [HINT, RESUME_L1])
def test_hints_that_do_not_fit_the_last_exit_are_refused(idle: Guest, hint: int) -> None:
    assert idle.seamcall(ENTER, rcx=idle.tdvpr | hint) == Rax(Status.OPERAND_INVALID, Operand.RCX)


def test_a_page_that_is_no_tdvpr_is_refused(idle: Guest) -> None:
    assert idle.seamcall(ENTER, rcx=idle.td.tdr) == Rax(Status.PAGE_METADATA_INCORRECT, Operand.RCX)


def test_a_td_that_is_not_finalised_does_not_run(host: SeamcallHost) -> None:
    td = host.create_td()
    tdvpr = host.create_vcpu(td)
    host.call(ENTER, rcx=tdvpr, accept=Status.OP_STATE_INCORRECT)


def test_a_running_vcpu_cannot_be_entered_twice(idle: Guest) -> None:
    idle.enter()
    assert idle.seamcall(ENTER, rcx=idle.tdvpr, lp=1) == Rax(Status.VCPU_STATE_INCORRECT)


def test_a_vcpu_belongs_to_its_lp_until_it_is_flushed(idle: Guest) -> None:
    idle.enter()
    idle.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    assert idle.seamcall(ENTER, rcx=idle.tdvpr, lp=1) == Rax(Status.VCPU_ASSOCIATED)
    idle.host.call(SeamcallLeaf.TDH_VP_FLUSH, rcx=idle.tdvpr)
    idle.enter(lp=1)
    assert idle.module.running[1] is idle.tdvps


def test_a_moved_tsc_is_noticed(idle: Guest) -> None:
    idle.module.platform.wrmsr(IA32_TSC_ADJUST, 1)
    assert idle.seamcall(ENTER, rcx=idle.tdvpr) == Rax(Status.INCONSISTENT_MSR, IA32_TSC_ADJUST)


def test_a_tsc_that_went_back_is_noticed(idle: Guest) -> None:
    idle.tdvps.last_exit_tsc = idle.module.platform.rdtsc() + (1 << 40)
    assert idle.seamcall(ENTER, rcx=idle.tdvpr) == Rax(Status.TSC_ROLLBACK)


def test_limited_cpuid_is_noticed(idle: Guest) -> None:
    idle.module.platform.wrmsr(IA32_MISC_ENABLE, 1 << 22)
    assert idle.seamcall(ENTER, rcx=idle.tdvpr) == Rax(Status.LIMIT_CPUID_MAXVAL_SET)


def test_a_failed_entry_leaves_no_lock_and_no_tlb_tracking_behind(idle: Guest) -> None:
    idle.tdcs.epoch_lock.raw = 0x8001  # a writer
    before = list(idle.tdcs.refcount)
    status = idle.seamcall(ENTER, rcx=idle.tdvpr)
    assert status == Rax(Status.OPERAND_BUSY, Operand.TD_EPOCH)
    idle.tdcs.epoch_lock.raw = 0
    assert idle.tdcs.refcount == before
    idle.enter()


def test_entry_flushes_stale_translations_only_in_a_new_epoch(idle: Guest) -> None:
    idle.enter()
    idle.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    before = idle.cpu.invalidations
    idle.enter()
    assert idle.cpu.invalidations == before
    idle.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    idle.host.call(SeamcallLeaf.TDH_MEM_TRACK, rcx=idle.td.tdr)
    idle.enter()
    assert idle.cpu.invalidations == before + 1


def test_a_page_cannot_go_while_a_vcpu_of_the_old_epoch_runs(idle: Guest) -> None:
    idle.enter()
    host, td = idle.host, idle.td
    host.call(SeamcallLeaf.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=td.tdr)
    host.call(SeamcallLeaf.TDH_MEM_TRACK, rcx=td.tdr)
    host.call(SeamcallLeaf.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr, lp=1, accept=Status.TLB_TRACKING_NOT_DONE)
    idle.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    host.call(SeamcallLeaf.TDH_MEM_PAGE_REMOVE, rcx=GPA, rdx=td.tdr)


# TDG.VP.VMCALL


@pytest.fixture(scope="module")
def vmcaller() -> Guest:
    platform = load_platform("golden")
    memory = PhysicalMemory(platform.ram_bytes)
    host = SeamcallHost(TdxModule(platform, memory, load_profile("1.5.01"), StaticCpus()))
    host.bring_up()
    return Guest(host)


@given(
    mask=st.integers(0, 0xFFFF).map(lambda bits: bits & 0xFFEC & ~(1 << RSP) & ~3),
    there=st.lists(st.integers(1, 2**64 - 1), min_size=16, max_size=16),
    back=st.lists(st.integers(1, 2**64 - 1), min_size=16, max_size=16),
)
def test_a_vmcall_passes_the_selected_registers_both_ways_and_no_other(
    vmcaller: Guest, mask: int, there: list[int], back: list[int]
) -> None:
    sent = {GPR_NAMES[index]: there[index] for index in PASSED}
    rip = vmcaller.cpu.rip
    assert vmcaller.try_tdcall(TdcallLeaf.TDG_VP_VMCALL, rcx=mask, **sent) == VMCALL_EXIT
    host_regs = vmcaller.regs
    assert host_regs[RCX] == mask
    for index in PASSED:
        assert host_regs[index] == (there[index] if mask >> index & 1 else 0)
    assert vmcaller.tdvps.vcpu_state == VcpuState.READY

    answer = {GPR_NAMES[index]: back[index] for index in PASSED}
    vmcaller.enter(**answer)
    gprs = vmcaller.cpu.gprs
    assert gprs[RAX] == 0
    assert gprs[RCX] == mask
    for index in PASSED:
        assert gprs[index] == (back if mask >> index & 1 else there)[index]
    assert vmcaller.cpu.rip == rip + TDCALL_BYTES


@pytest.mark.parametrize("mask", [1, 2, 1 << RSP, 1 << 32, 1 << 63])
def test_a_vmcall_that_would_pass_rax_rcx_rsp_or_more_fails(idle: Guest, mask: int) -> None:
    idle.enter()
    assert idle.tdcall(TdcallLeaf.TDG_VP_VMCALL, rcx=mask) == Rax(Status.OPERAND_INVALID, Operand.RCX)


def test_rbp_may_not_be_passed_by_a_td_that_keeps_it(host: SeamcallHost) -> None:
    guest = Guest(host, TdParams(config_flags=4))
    assert guest.tdcall(TdcallLeaf.TDG_VP_VMCALL, rcx=1 << RBP) == Rax(Status.OPERAND_INVALID, Operand.RCX)


def test_the_registers_of_the_host_do_not_reach_a_guest_that_was_interrupted(idle: Guest) -> None:
    idle.enter()
    idle.cpu.gprs[RBX] = 5
    assert idle.exit(ExitReason.EXTERNAL_INTERRUPT, interruption_info=0x8000_0031) == Rax(Status.SUCCESS, 1)
    idle.enter(rbx=99, rsi=98)
    assert idle.cpu.gprs[RBX] == 5
    assert idle.cpu.gprs[RSI] != 98


# The zero-step filter


def block(guest: Guest) -> None:
    """Take the guest's page away without removing it."""
    guest.host.call(SeamcallLeaf.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=guest.td.tdr)
    guest.host.call(SeamcallLeaf.TDH_MEM_TRACK, rcx=guest.td.tdr)


def unblock(guest: Guest) -> None:
    guest.host.call(SeamcallLeaf.TDH_MEM_RANGE_UNBLOCK, rcx=GPA, rdx=guest.td.tdr)


def fault_until_suspected(guest: Guest) -> None:
    """Let the guest fault at one instruction until the module suspects its host."""
    for _ in range(7):
        guest.enter()
        status = guest.exit(ExitReason.EPT_VIOLATION, gpa=GPA | 0x123, qualification=0x181)
        assert status == Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
    assert guest.tdvps.last_epf_gpa_list_idx == 1


def test_a_guest_that_faults_seven_times_at_one_instruction_waits_for_its_page(idle: Guest) -> None:
    block(idle)
    fault_until_suspected(idle)
    assert idle.seamcall(ENTER, rcx=idle.tdvpr) == Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
    assert idle.regs[R8] == GPA
    assert not idle.is_running

    unblock(idle)
    idle.enter()
    assert idle.is_running


def test_a_guest_that_makes_progress_suspects_nobody(idle: Guest) -> None:
    idle.enter()
    for number in range(20):
        idle.cpu.rip = 0x1000 * number
        idle.exit(ExitReason.EPT_VIOLATION, gpa=FREE_GPA, qualification=0x181)
        idle.enter()
    assert idle.tdvps.last_epf_gpa_list_idx == 0


def test_a_td_may_ask_to_be_told_about_zero_stepping(idle: Guest) -> None:
    idle.enter()
    assert idle.tdcall(TdcallLeaf.TDG_VM_WR, rdx=NOTIFY_ENABLES, r8=1, r9=1) == Rax(Status.SUCCESS)
    idle.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    block(idle)
    fault_until_suspected(idle)
    unblock(idle)
    idle.enter()
    assert idle.cpu.injected == VE


@pytest.mark.parametrize("how", ["NMI blocked", "NMI unblocked by the last exit", "last #VE unread"])
def test_nobody_is_told_about_zero_stepping_at_a_bad_time(idle: Guest, how: str) -> None:
    idle.tdcs.notify_enables = 1
    block(idle)
    fault_until_suspected(idle)
    unblock(idle)
    if how == "NMI blocked":
        idle.tdvps.vmcs[INTERRUPTIBILITY] = 1 << 3
    elif how == "last #VE unread":
        idle.tdvps.ve_info.valid = 1
    else:
        idle.cpu.exit.qualification |= 1 << 12
    idle.enter()
    assert idle.cpu.injected == 0

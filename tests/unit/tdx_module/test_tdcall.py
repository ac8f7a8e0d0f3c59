"""TDCALL leaves: the guest's own operands, and what a failing one changes."""

import hashlib

import pytest

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import R8, R9, R11, RCX, RDX
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.sept import walk
from sim_backend.tdx_module.sept_states import TDEL, SeptState, state_of
from sim_backend.tdx_module.td_params import ATTR_DEBUG
from tests.unit.tdx_module.guest_side import FREE_GPA, GP, GPA, SHARED, TDCALL_BYTES, Guest
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

SUCCESS = Rax(Status.SUCCESS)
EPT_VIOLATION = Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
MSR_INTR_PENDING = 0x9A
NULL = (1 << 64) - 1


def invalid(operand: Operand) -> Rax:
    return Rax(Status.OPERAND_INVALID, operand)


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host)


@pytest.mark.parametrize("leaf", [13, 14, 15, 16, 17, 19, 21, 28, 0xFFFF])
def test_an_unknown_leaf_fails(guest: Guest, leaf: int) -> None:
    assert guest.tdcall(leaf) == invalid(Operand.RAX)


@pytest.mark.parametrize("rax", [1 << 16 | 1, 1 << 24 | 7, 1 << 63 | 1, 2 << 16 | 7])
def test_versions_and_reserved_bits_fail(guest: Guest, rax: int) -> None:
    assert guest.tdcall(rax) == invalid(Operand.RAX)


def test_tdcall_outside_64_bit_mode_is_a_fault(guest: Guest) -> None:
    guest.cpu.state.cs.ar &= ~(1 << 13)
    rip = guest.cpu.rip
    assert guest.try_tdcall(TdcallLeaf.TDG_VP_INFO) is None
    assert (guest.cpu.injected, guest.cpu.rip) == (GP, rip)


def test_a_leaf_that_fails_is_completed_all_the_same(guest: Guest) -> None:
    rip = guest.cpu.rip
    guest.tdcall(0xFFFF)
    assert guest.cpu.rip == rip + TDCALL_BYTES


def test_vp_info_tells_the_guest_about_its_td(host: SeamcallHost) -> None:
    guest = Guest(host, TdParams(attributes=ATTR_DEBUG, max_vcpus=7))
    assert guest.tdcall(TdcallLeaf.TDG_VP_INFO) == SUCCESS
    gprs = guest.cpu.gprs
    assert (gprs[RCX], gprs[RDX], gprs[R8], gprs[R9], gprs[R11]) == (48, ATTR_DEBUG, 7 << 32 | 1, 0, 0)


def test_ve_info_can_be_read_once(guest: Guest) -> None:
    guest.exit(ExitReason.HLT)
    assert guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET) == SUCCESS
    assert guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET) == Rax(Status.NO_VALID_VE_INFO)


# RTMR.EXTEND


def test_an_rtmr_is_the_hash_of_its_value_and_the_extension(guest: Guest) -> None:
    memory = guest.module.memory
    data = bytes(range(48))
    memory.write(guest.page + 64, data)
    expected = bytes(48)
    for _ in range(2):
        expected = hashlib.sha384(expected + data).digest()
        assert guest.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA + 64, rdx=2) == SUCCESS
    assert guest.tdcs.rtmr == [bytes(48), bytes(48), expected, bytes(48)]


@pytest.mark.parametrize(
    ("rcx", "rdx", "operand"), [(GPA + 8, 0, Operand.RCX), (SHARED | GPA, 0, Operand.RCX), (GPA, 4, Operand.RDX)]
)
def test_an_extension_needs_an_aligned_private_gpa_and_one_of_four_registers(
    guest: Guest, rcx: int, rdx: int, operand: Operand
) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=rcx, rdx=rdx) == invalid(operand)
    assert guest.tdcs.rtmr == [bytes(48)] * 4


def test_a_guest_is_patient_with_a_host_that_reads_its_rtmrs(guest: Guest) -> None:
    guest.tdcs.rtmr_lock.raw = 1
    status = guest.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA)
    assert status == Rax(Status.OPERAND_BUSY, Operand.RTMR)


def test_a_host_that_waits_for_a_lock_too_long_gets_the_lp_back(guest: Guest) -> None:
    guest.tdcs.rtmr_lock.raw = 2  # HOST_PRIORITY: the host failed, and will try again
    assert guest.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA).status is Status.OPERAND_BUSY
    guest.tdvps.hp_lock_busy_start -= guest.tdcs.hp_lock_timeout
    status = guest.try_tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA)
    assert status == Rax(Status.HOST_PRIORITY_BUSY_TIMEOUT)
    assert Rax.decode(guest.cpu.gprs[0]).status is Status.OPERAND_BUSY, "the TDCALL is completed"


def test_an_operand_on_a_page_that_is_not_there_is_an_ept_violation(guest: Guest) -> None:
    rip = guest.cpu.rip
    status = guest.try_tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=FREE_GPA)
    assert status == EPT_VIOLATION
    assert guest.regs[R8] == FREE_GPA
    assert guest.cpu.rip == rip, "the TDCALL runs again"


# PAGE.ACCEPT


def entry_of(guest: Guest, gpa: int, level: int = 0) -> int:
    return walk(guest.module.q, guest.tdcs, gpa, level)[0]


def test_accepting_a_page_maps_it_zeroed(guest: Guest) -> None:
    page = guest.host.aug_page(guest.td, FREE_GPA)
    guest.module.memory.write(page, b"left by the host")
    assert guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=FREE_GPA) == SUCCESS
    assert state_of(guest.module.q[entry_of(guest, FREE_GPA)]) == SeptState.MAPPED
    assert not any(guest.module.memory.read(page, 4096))
    again = guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=FREE_GPA)
    assert again == Rax(Status.PAGE_ALREADY_ACCEPTED)


def test_accepting_a_page_that_the_host_did_not_add_asks_for_it(guest: Guest) -> None:
    assert guest.try_tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=FREE_GPA) == EPT_VIOLATION
    assert (guest.regs[R8], guest.regs[RDX] & 0xF) == (FREE_GPA, 1)


@pytest.mark.parametrize("rcx", [FREE_GPA | 3, FREE_GPA | 1, SHARED | FREE_GPA, 1 << 63 | FREE_GPA, FREE_GPA | 1 << 5])
def test_accepting_needs_an_aligned_private_gpa_of_4_kib_or_2_mib(guest: Guest, rcx: int) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=rcx) == invalid(Operand.RCX)


def test_a_large_pending_page_is_the_hosts_to_split_for_a_small_acceptance(guest: Guest) -> None:
    gpa = 1 << 30
    guest.host.aug_page(guest.td, gpa, level=1)
    assert guest.try_tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa + 4096) == EPT_VIOLATION
    guest.enter()
    assert guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | 1) == SUCCESS
    status = guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa + 4096)
    assert status == Rax(Status.PAGE_ALREADY_ACCEPTED, 1)


def test_small_pages_cannot_be_accepted_as_a_large_one(guest: Guest) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=1) == Rax(Status.PAGE_SIZE_MISMATCH, 1)


def test_accepting_a_large_page_goes_on_after_an_interrupt(guest: Guest) -> None:
    gpa = 1 << 30
    page = guest.host.aug_page(guest.td, gpa, level=1)
    guest.module.memory.write(page + (2 << 20) - 8, b"the last")
    guest.module.platform.wrmsr(MSR_INTR_PENDING, 1)
    rip = guest.cpu.rip
    assert guest.try_tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | 1) is None
    assert guest.cpu.rip == rip, "the TDCALL runs again"
    assert state_of(guest.module.q[entry_of(guest, gpa, 1)]) == SeptState.PENDING
    guest.module.platform.wrmsr(MSR_INTR_PENDING, 0)
    assert guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | 1) == SUCCESS
    assert not any(guest.module.memory.read(page, 2 << 20))


def test_an_entry_that_the_host_works_on_is_busy(guest: Guest) -> None:
    guest.host.aug_page(guest.td, FREE_GPA)
    guest.module.q[entry_of(guest, FREE_GPA)] |= TDEL
    status = guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=FREE_GPA)
    assert status.status is Status.OPERAND_BUSY


# Reports


def test_a_report_needs_aligned_operands_and_sub_type_0(guest: Guest) -> None:
    leaf = TdcallLeaf.TDG_MR_REPORT
    assert guest.tdcall(leaf, rcx=GPA + 512, rdx=GPA) == invalid(Operand.RCX)
    assert guest.tdcall(leaf, rcx=GPA, rdx=GPA + 32) == invalid(Operand.RDX)
    assert guest.tdcall(leaf, rcx=GPA, rdx=GPA + 64, r8=1) == invalid(Operand.R8)


def test_an_interrupted_report_runs_again(guest: Guest) -> None:
    guest.module.platform.wrmsr(MSR_INTR_PENDING, 1)
    rip = guest.cpu.rip
    assert guest.try_tdcall(TdcallLeaf.TDG_MR_REPORT, rcx=GPA, rdx=GPA + 1024) is None
    assert (guest.cpu.rip, guest.cpu.gprs[0]) == (rip, TdcallLeaf.TDG_MR_REPORT)
    assert guest.module.memory.read(guest.page, 1) == b"\0"


# Metadata

TD_CTLS = 0x9110_0003_0000_0009
ATTRIBUTES = 0x1110_0003_0000_0000


def test_a_guest_reads_its_attributes_and_cannot_write_them(guest: Guest) -> None:
    assert guest.vm_rd(ATTRIBUTES) == 0
    status = guest.tdcall(TdcallLeaf.TDG_VM_WR, rdx=ATTRIBUTES, r8=1, r9=1)
    assert status == Rax(Status.METADATA_FIELD_NOT_WRITABLE)


def test_version_1_of_vm_rd_enumerates_every_readable_field(guest: Guest) -> None:
    leaf = 1 << 16 | TdcallLeaf.TDG_VM_RD
    assert guest.tdcall(leaf, rdx=NULL).status is Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT
    field_id = guest.cpu.gprs[RDX]
    seen = []
    while field_id != NULL:
        seen.append(field_id)
        assert guest.tdcall(leaf, rdx=field_id).status in {Status.SUCCESS, Status.METADATA_FIELD_NOT_READABLE}
        if guest.cpu.gprs[RDX] == NULL:
            break
        field_id = guest.cpu.gprs[RDX]
    assert ATTRIBUTES in seen
    assert len(seen) == len(set(seen)) > 20


def test_another_td_is_out_of_reach_of_vm_rd(guest: Guest) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_VM_RD, rcx=1, rdx=ATTRIBUTES) == invalid(Operand.RCX)


# CPUIDVE


def test_a_guest_may_turn_its_cpuid_into_ve(guest: Guest) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_VP_CPUIDVE_SET, rcx=1) == SUCCESS
    guest.exit(ExitReason.CPUID)
    assert guest.tdvps.ve_info.valid
    assert guest.tdcall(TdcallLeaf.TDG_VP_CPUIDVE_SET, rcx=4) == invalid(Operand.RCX)


# L2 VMs that a TD does not have


@pytest.mark.parametrize("leaf", [TdcallLeaf.TDG_VP_ENTER, TdcallLeaf.TDG_VP_INVEPT, TdcallLeaf.TDG_VP_INVVPID])
def test_l2_leaves_fail_in_a_td_without_l2_vms(guest: Guest, leaf: TdcallLeaf) -> None:
    status = guest.tdcall(leaf, rcx=1 << 52, rdx=GPA)
    assert status.status is Status.OPERAND_INVALID

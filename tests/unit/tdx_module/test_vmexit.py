"""What the module does with VM exits of a TD: events for the guest, emulation, and TD exits."""

import pytest

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import R8, R9, RAX, RBP, RBX, RCX, RDX, RSI
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.td_exit import BUS_LOCK_PREEMPTED
from sim_backend.tdx_module.td_params import ATTR_DEBUG, ATTR_SEPT_VE_DISABLE
from sim_backend.tdx_module.td_vmcs import EXCEPTION_BITMAP, PF_ERROR_CODE_MASK, PF_ERROR_CODE_MATCH
from sim_backend.tdx_module.tdvps import VcpuState
from tests.unit.tdx_module.guest_side import DF, FREE_GPA, GP, GPA, SHARED, UD, VE, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Rax, Status

READ = 0x181
WRITE = 0x182
CR0_PE, CR0_NE, CR0_WP, CR0_CD, CR0_PG = 1 << 0, 1 << 5, 1 << 16, 1 << 30, 1 << 31
CR4_PAE, CR4_MCE, CR4_VMXE, CR4_PKE = 1 << 5, 1 << 6, 1 << 13, 1 << 22
RFLAGS_RF = 1 << 16
ENTRY_FAILED = 1 << 31
VECTOR_MC = 0x8000_0312
NMI = 0x8000_0202
NON_RECOVERABLE_TD_NON_ACCESSIBLE = Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host)


# Events for the guest


@pytest.mark.parametrize(
    "reason",
    [
        ExitReason.HLT,
        ExitReason.IO_INSTRUCTION,
        ExitReason.WBINVD,
        ExitReason.MWAIT,
        ExitReason.VMCALL,
        ExitReason.INVD,
    ],
)
def test_instructions_that_a_td_handles_itself_become_a_ve(guest: Guest, reason: ExitReason) -> None:
    assert guest.exit(reason, qualification=0x1234, instruction_length=3, instruction_info=7) is None
    assert guest.cpu.injected == VE
    assert guest.cpu.rflags & RFLAGS_RF
    assert guest.cpu.rip == 0xFFFF_FFF0, "the instruction is not completed"
    assert guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET) == Rax(Status.SUCCESS)
    gprs = guest.cpu.gprs
    assert (gprs[RCX], gprs[RDX], gprs[10]) == (reason, 0x1234, 7 << 32 | 3)


@pytest.mark.parametrize("reason", [ExitReason.VMXON, ExitReason.SEAMCALL, ExitReason.GETSEC, ExitReason.ENCLS])
def test_instructions_that_a_td_does_not_have_are_undefined(guest: Guest, reason: ExitReason) -> None:
    assert guest.exit(reason) is None
    assert guest.cpu.injected == UD


@pytest.mark.parametrize("reason", [ExitReason.ENQCMD, ExitReason.RDPMC])
def test_instructions_that_a_td_may_not_use_are_general_protection_faults(guest: Guest, reason: ExitReason) -> None:
    assert guest.exit(reason) is None
    assert guest.cpu.injected == GP


def test_a_second_ve_before_the_first_is_read_is_a_double_fault(guest: Guest) -> None:
    guest.exit(ExitReason.HLT)
    guest.exit(ExitReason.HLT)
    assert guest.cpu.take_injected() == DF
    assert guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET) == Rax(Status.SUCCESS)
    guest.exit(ExitReason.HLT)
    assert guest.cpu.injected == VE


def test_a_debugger_sees_an_intercepted_exception_before_the_guest(host: SeamcallHost) -> None:
    guest = Guest(host, TdParams(attributes=ATTR_DEBUG))
    guest.tdvps.vmcs[EXCEPTION_BITMAP] |= 1 << 6
    assert guest.exit(ExitReason.HLT) is None, "#VE is not intercepted"
    assert guest.exit(ExitReason.VMXON) == Rax(Status.SUCCESS, ExitReason.EXCEPTION_OR_NMI)
    assert (guest.regs[R9], guest.regs[RCX]) == (UD, 0)
    guest.enter()
    assert guest.cpu.injected == UD, "it was only postponed"


@pytest.mark.parametrize(("match", "leaves"), [(0, True), (4, False)])
def test_a_debugger_may_filter_page_faults_by_error_code(host: SeamcallHost, match: int, leaves: bool) -> None:
    guest = Guest(host, TdParams(attributes=ATTR_DEBUG))
    guest.tdvps.vmcs.update({EXCEPTION_BITMAP: 1 << 14, PF_ERROR_CODE_MASK: 4, PF_ERROR_CODE_MATCH: match})
    status = guest.exit(ExitReason.EPT_VIOLATION, gpa=1 << 48, qualification=READ)
    assert (status is not None) == leaves
    assert guest.cpu.injected == 0x8000_0B0E


def test_an_exception_bitmap_means_nothing_in_a_production_td(guest: Guest) -> None:
    guest.tdvps.vmcs[EXCEPTION_BITMAP] |= 1 << 6
    assert guest.exit(ExitReason.VMXON) is None


# Exit reasons with more than a number


def test_a_preempted_bus_lock_is_told_with_the_exit_that_overtook_it(guest: Guest) -> None:
    status = guest.exit(ExitReason.EXTERNAL_INTERRUPT | BUS_LOCK_PREEMPTED)  # type: ignore[arg-type]
    assert status == Rax(Status.SUCCESS, ExitReason.EXTERNAL_INTERRUPT | BUS_LOCK_PREEMPTED)
    guest.enter()
    assert guest.exit(ExitReason.EXTERNAL_INTERRUPT) == Rax(Status.SUCCESS, ExitReason.EXTERNAL_INTERRUPT)


@pytest.mark.parametrize(("reason", "event"), [(ExitReason.CPUID, 0), (ExitReason.HLT, VE)])
def test_a_preempted_bus_lock_leaves_the_guest_where_its_exit_would_not(
    guest: Guest, reason: ExitReason, event: int
) -> None:
    status = guest.exit(reason | BUS_LOCK_PREEMPTED)  # type: ignore[arg-type]
    assert status == Rax(Status.SUCCESS, ExitReason.BUS_LOCK | BUS_LOCK_PREEMPTED)
    assert guest.cpu.injected == event
    assert guest.cpu.rip == 0xFFFF_FFF0 + (0 if event else 2)


def test_a_preempted_bus_lock_is_told_with_a_tdvmcall(guest: Guest) -> None:
    guest.cpu.gprs[RAX], guest.cpu.gprs[RCX] = TdcallLeaf.TDG_VP_VMCALL, 0
    status = guest.exit(ExitReason.TDCALL | BUS_LOCK_PREEMPTED)  # type: ignore[arg-type]
    assert status == Rax(Status.SUCCESS, ExitReason.TDCALL | BUS_LOCK_PREEMPTED)


@pytest.mark.parametrize(
    ("attributes", "reason", "status"),
    [
        (0, ExitReason.FAILED_ENTRY_GUEST_STATE, Status.NON_RECOVERABLE_TD),
        (ATTR_DEBUG, ExitReason.FAILED_ENTRY_GUEST_STATE, Status.SUCCESS),
        (ATTR_DEBUG, ExitReason.FAILED_ENTRY_MACHINE_CHECK, NON_RECOVERABLE_TD_NON_ACCESSIBLE),
    ],
)
def test_a_guest_that_cannot_be_entered_is_lost_unless_debugged(
    host: SeamcallHost, attributes: int, reason: ExitReason, status: Status
) -> None:
    guest = Guest(host, TdParams(attributes=attributes))
    raw = reason | ENTRY_FAILED
    assert guest.exit(raw, qualification=3) == Rax(status, raw)  # type: ignore[arg-type]
    assert guest.regs[RCX] == 3
    assert guest.tdr.fatal == (status is not Status.SUCCESS)


def test_an_smi_in_a_sleeping_guest_is_like_an_interrupt(guest: Guest) -> None:
    assert guest.exit(ExitReason.C_STATE_SMI) == Rax(Status.SUCCESS, ExitReason.C_STATE_SMI)
    assert not guest.tdr.fatal


# EPT violations


@pytest.mark.parametrize("access", [READ, WRITE])
def test_a_missing_private_page_is_the_hosts_business(guest: Guest, access: int) -> None:
    status = guest.exit(ExitReason.EPT_VIOLATION, gpa=FREE_GPA | 0x123, qualification=access)
    assert status == Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
    assert guest.regs[RCX] == access & 7
    assert guest.regs[R8] == FREE_GPA, "the host is not told where in the page"


def test_a_pending_page_is_the_guests_business(guest: Guest) -> None:
    guest.host.aug_page(guest.td, FREE_GPA)
    assert guest.exit(ExitReason.EPT_VIOLATION, gpa=FREE_GPA | 0x123, gla=0x77, qualification=WRITE) is None
    assert guest.cpu.injected == VE
    assert guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET) == Rax(Status.SUCCESS)
    assert guest.cpu.gprs[R8] == 0x77
    assert guest.cpu.gprs[R9] == FREE_GPA | 0x123


def test_a_td_may_leave_pending_pages_to_the_host(host: SeamcallHost) -> None:
    guest = Guest(host, TdParams(attributes=ATTR_SEPT_VE_DISABLE))
    guest.host.aug_page(guest.td, FREE_GPA)
    status = guest.exit(ExitReason.EPT_VIOLATION, gpa=FREE_GPA, qualification=READ)
    assert status == Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
    assert guest.regs[RDX] & 0xF == 6, "PENDING_EPT_VIOLATION"


def test_a_missing_shared_page_is_the_hosts_business(guest: Guest) -> None:
    gpa = SHARED | 0x5000
    status = guest.exit(ExitReason.EPT_VIOLATION, gpa=gpa, qualification=READ)
    assert status == Rax(Status.SUCCESS, ExitReason.EPT_VIOLATION)
    assert guest.regs[R8] == gpa


@pytest.mark.parametrize("gpa", [1 << 48, 1 << 51 | GPA])
def test_a_gpa_beyond_the_width_of_the_td_is_a_page_fault_or_a_ve(guest: Guest, gpa: int) -> None:
    assert guest.exit(ExitReason.EPT_VIOLATION, gpa=gpa, qualification=READ) is None
    assert guest.cpu.injected in {VE, 0x8000_0B0E}


# TD exits


def test_an_interrupt_leaves_the_vcpu_ready_and_its_registers_hidden(guest: Guest) -> None:
    guest.cpu.gprs[RBX] = 0x5EC2E7
    info = 0x8000_0031
    assert guest.exit(ExitReason.EXTERNAL_INTERRUPT, interruption_info=info) == Rax(Status.SUCCESS, 1)
    assert guest.regs[R9] == info
    assert not any(guest.regs[index] for index in (RBX, RBP, RSI, RCX, RDX, R8))
    assert guest.tdvps.vcpu_state == VcpuState.READY
    assert guest.cpu.gprs[RBX] == 0x5EC2E7


def test_a_triple_fault_disables_the_vcpu_only(guest: Guest) -> None:
    assert guest.exit(ExitReason.TRIPLE_FAULT) == Rax(Status.NON_RECOVERABLE_VCPU, ExitReason.TRIPLE_FAULT)
    assert guest.tdvps.vcpu_state == VcpuState.DISABLED
    assert not guest.tdr.fatal
    status = guest.seamcall(SeamcallLeaf.TDH_VP_ENTER, rcx=guest.tdvpr)
    assert status == Rax(Status.VCPU_STATE_INCORRECT)


def test_a_machine_check_makes_the_td_unusable(guest: Guest) -> None:
    status = guest.exit(ExitReason.EXCEPTION_OR_NMI, interruption_info=VECTOR_MC)
    assert status == Rax(NON_RECOVERABLE_TD_NON_ACCESSIBLE, 0)
    assert guest.seamcall(SeamcallLeaf.TDH_VP_ENTER, rcx=guest.tdvpr) == Rax(Status.TD_FATAL)


def test_a_vcpu_of_a_td_that_died_meanwhile_leaves_at_its_next_exit(guest: Guest) -> None:
    guest.tdr.fatal = True
    assert guest.exit(ExitReason.HLT) == Rax(NON_RECOVERABLE_TD_NON_ACCESSIBLE, ExitReason.HLT)
    assert not guest.is_running


def test_a_host_nmi_is_a_td_exit(guest: Guest) -> None:
    assert guest.exit(ExitReason.EXCEPTION_OR_NMI, interruption_info=NMI) == Rax(Status.SUCCESS, 0)


@pytest.mark.parametrize(("attributes", "status"), [(0, Status.NON_RECOVERABLE_TD), (ATTR_DEBUG, Status.SUCCESS)])
def test_only_a_debugger_may_ask_for_other_exits(host: SeamcallHost, attributes: int, status: Status) -> None:
    guest = Guest(host, TdParams(attributes=attributes))
    assert guest.exit(ExitReason.DR_ACCESS) == Rax(status, ExitReason.DR_ACCESS)


# Control registers


def mov_to_cr(guest: Guest, number: int, value: int) -> None:
    guest.cpu.gprs[RBX] = value
    assert guest.exit(ExitReason.CR_ACCESS, qualification=number | RBX << 8) is None


def test_paging_can_be_switched_on_and_activates_long_mode(guest: Guest) -> None:
    guest.cpu.state.efer &= ~(1 << 10)
    mov_to_cr(guest, 4, CR4_MCE | CR4_PAE)
    mov_to_cr(guest, 0, CR0_PE | CR0_NE | CR0_PG | CR0_WP)
    assert guest.cpu.injected == 0
    assert guest.cpu.state.cr0 == CR0_PE | CR0_NE | CR0_PG | CR0_WP
    assert guest.cpu.state.efer & 1 << 10
    assert guest.cpu.rip == 0xFFFF_FFF0 + 4


@pytest.mark.parametrize(
    ("cr0", "event"),
    [
        (CR0_PE | CR0_NE | CR0_CD, VE),
        (CR0_NE, VE),
        (CR0_PE, GP),
        (CR0_NE | CR0_PG, GP),
        (CR0_PE | CR0_NE | 1 << 32, GP),
    ],
)
def test_cr0_bits_that_are_not_the_guests_are_refused(guest: Guest, cr0: int, event: int) -> None:
    before = guest.cpu.state.cr0
    mov_to_cr(guest, 0, cr0)
    assert (guest.cpu.injected, guest.cpu.state.cr0) == (event, before)


@pytest.mark.parametrize(
    ("cr4", "event"), [(0, VE), (CR4_MCE | CR4_VMXE, VE), (CR4_MCE | CR4_PKE, GP), (CR4_MCE | 1 << 40, GP)]
)
def test_cr4_bits_that_are_not_the_guests_are_refused(guest: Guest, cr4: int, event: int) -> None:
    before = guest.cpu.state.cr4
    mov_to_cr(guest, 4, cr4)
    assert (guest.cpu.injected, guest.cpu.state.cr4) == (event, before)


def test_clts_and_lmsw_change_only_their_bits(guest: Guest) -> None:
    assert guest.exit(ExitReason.CR_ACCESS, qualification=3 << 4 | 0xE << 16) is None
    assert guest.cpu.state.cr0 == CR0_PE | CR0_NE | 0xE, "LMSW cannot clear PE"
    assert guest.exit(ExitReason.CR_ACCESS, qualification=2 << 4) is None
    assert guest.cpu.state.cr0 == CR0_PE | CR0_NE | 0x6


@pytest.mark.parametrize(
    ("xcr0", "index", "event"),
    [(3, 0, 0), (1, 0, 0), (2, 0, GP), (7, 0, GP), (3, 1, GP), (0, 0, GP), (3 | 1 << 40, 0, GP)],
)
def test_xcr0_stays_within_xfam(guest: Guest, xcr0: int, index: int, event: int) -> None:
    guest.cpu.gprs[RAX], guest.cpu.gprs[RDX], guest.cpu.gprs[RCX] = xcr0 & 0xFFFF_FFFF, xcr0 >> 32, index
    assert guest.exit(ExitReason.XSETBV) is None
    assert guest.cpu.injected == event
    assert guest.cpu.state.xcr0 == (1 if event else xcr0)


# NMIs

PEND_NMI = 0xA020_0000_0000_000B


def test_a_pending_nmi_waits_for_its_window(host: SeamcallHost) -> None:
    guest = Guest(host, enter=False)
    guest.host.call(SeamcallLeaf.TDH_VP_WR, rcx=guest.tdvpr, rdx=PEND_NMI, r8=1, r9=1)
    guest.enter()
    assert (guest.cpu.nmi_window, guest.cpu.injected) == (True, 0)
    assert guest.exit(ExitReason.NMI_WINDOW) is None
    assert (guest.cpu.nmi_window, guest.cpu.injected) == (False, NMI)
    assert guest.tdvps.pend_nmi == 0


def test_a_pending_nmi_waits_for_a_ve_to_be_read(host: SeamcallHost) -> None:
    guest = Guest(host)
    guest.exit(ExitReason.HLT)
    guest.exit(ExitReason.EXTERNAL_INTERRUPT)
    guest.host.call(SeamcallLeaf.TDH_VP_WR, rcx=guest.tdvpr, rdx=PEND_NMI, r8=1, r9=1)
    guest.enter()
    windows = [guest.cpu.nmi_window]
    guest.tdcall(TdcallLeaf.TDG_VP_VEINFO_GET)
    windows.append(guest.cpu.nmi_window)
    assert windows == [False, True]

"""MSRs in a TD: native, emulated, #VE or #GP."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import RAX, RCX, RDX
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.cpuid_virtualization import CpuidFlags
from sim_backend.tdx_module.msr_virtualization import (
    HIGH_MSRS,
    LOW_MSRS,
    MSR_LOOKUP,
    NOTHING_NATIVE,
    MsrAction,
    action,
    build_bitmap,
    native_features,
)
from sim_backend.tdx_module.tdcs import MSR_BITMAP_PAGE
from tests.unit.tdx_module.guest_side import GP, VE, Guest

EFER, XSS, DEBUGCTL, ARCH_CAPABILITIES, MISC_ENABLE = 0xC000_0080, 0xDA0, 0x1D9, 0x10A, 0x1A0
XAPIC_DISABLE_STATUS, PERF_CAPABILITIES, VMX_BASIC, LBR_DEPTH, FS_BASE = 0xBD, 0x345, 0x480, 0x14CF, 0xC000_0100
TSC_DEADLINE, X2APIC_ID, KVM_SYSTEM_TIME = 0x6E0, 0x802, 0x4B56_4D01
XFAM_LBR = 1 << 15
ATTR_PERFMON = 1 << 63
FEATURES = ["FIXED_0", "PERFMON", "PKS", "XFD", "UMWAIT", "TSX", "XFAM_PT", "XFAM_CET", "XFAM_ULI", "XFAM_LBR"]


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host)


def rdmsr(guest: Guest, msr: int) -> int:
    gprs = guest.cpu.gprs
    gprs[RAX] = gprs[RDX] = 0
    gprs[RCX] = msr
    assert guest.exit(ExitReason.MSR_READ) is None
    return gprs[RDX] << 32 | gprs[RAX]


def wrmsr(guest: Guest, msr: int, value: int) -> int:
    """Write and return the event that the guest gets for it."""
    gprs = guest.cpu.gprs
    gprs[RCX], gprs[RAX], gprs[RDX] = msr, value & 0xFFFF_FFFF, value >> 32
    assert guest.exit(ExitReason.MSR_WRITE) is None
    return guest.cpu.take_injected()


# The bitmap


@given(
    features=st.sets(st.sampled_from(FEATURES)),
    msr=st.one_of(
        st.integers(0, 0x1FFF),
        st.integers(0xC000_0000, 0xC000_1FFF),
        st.sampled_from(MSR_LOOKUP).map(lambda r: r.first),
    ),
    write=st.booleans(),
)
def test_the_page_says_what_the_policy_says(features: set[str], msr: int, write: bool) -> None:
    bitmap = build_bitmap(frozenset(features), 0)
    page = bitmap.page
    offset = (2048 if write else 0) + (1024 if msr in HIGH_MSRS else 0)
    bit = page[offset + (msr & 0x1FFF) // 8] >> (msr & 7) & 1
    assert bit == bitmap.exits(msr, write)


@given(features=st.sets(st.sampled_from(FEATURES)), more=st.sets(st.sampled_from(FEATURES)))
def test_more_features_make_no_msr_exit_that_was_native(features: set[str], more: set[str]) -> None:
    few, many = build_bitmap(frozenset(features), 0), build_bitmap(frozenset(features | more), 0)
    assert few.rd - many.rd <= {PERF_CAPABILITIES}
    assert few.wr <= many.wr


def test_msrs_outside_the_bitmap_always_exit() -> None:
    bitmap = build_bitmap(frozenset(FEATURES), 0)
    for msr in (max(LOW_MSRS) + 1, min(HIGH_MSRS) - 1, max(HIGH_MSRS) + 1, KVM_SYSTEM_TIME):
        assert bitmap.exits(msr, False)
        assert bitmap.exits(msr, True)


def test_before_mng_init_everything_exits() -> None:
    assert NOTHING_NATIVE.page == b"\xff" * 4096


def test_features_follow_attributes_xfam_and_cpuid() -> None:
    flags = CpuidFlags()
    assert native_features(0, 3, flags) == {"FIXED_0"}
    assert native_features(ATTR_PERFMON, 3 | XFAM_LBR, flags) == {"FIXED_0", "PERFMON", "XFAM_LBR"}


def test_the_bitmap_of_a_td_is_in_its_tdcs(host: SeamcallHost) -> None:
    plain, lbr = Guest(host, enter=False), Guest(host, TdParams(xfam=3 | XFAM_LBR), enter=False)
    pages = [host.module.memory.read(each.td.tdcx[MSR_BITMAP_PAGE], 4096) for each in (plain, lbr)]
    assert pages[0] == plain.tdcs.msr_bitmap.page != pages[1]
    assert plain.tdcs.msr_bitmap.exits(LBR_DEPTH, False)
    assert not lbr.tdcs.msr_bitmap.exits(LBR_DEPTH, False)
    assert not plain.tdcs.msr_bitmap.exits(FS_BASE, True)


# Intercepted accesses


@pytest.mark.parametrize("msr", [0x8, 0x1E00, 0x3000, 0x4000_0000, 0xC001_0000, KVM_SYSTEM_TIME, 0xFFFF_FFFF])
@pytest.mark.parametrize("write", [False, True])
def test_msrs_that_the_module_does_not_know_become_a_ve(msr: int, write: bool) -> None:
    assert action(msr, write=write, flags=CpuidFlags()) is MsrAction.VE


def test_the_deadline_timer_is_a_fault_unless_cpuid_shows_it() -> None:
    assert action(TSC_DEADLINE, write=True, flags=CpuidFlags()) is MsrAction.GP
    assert action(TSC_DEADLINE, write=True, flags=CpuidFlags(tsc_deadline=True)) is MsrAction.VE


def test_the_ve_of_an_msr_names_the_access(guest: Guest) -> None:
    rdmsr(guest, KVM_SYSTEM_TIME)
    assert guest.cpu.take_injected() == VE
    assert guest.tdvps.ve_info.exit_reason == ExitReason.MSR_READ
    guest.tdvps.ve_info.valid = 0
    assert wrmsr(guest, KVM_SYSTEM_TIME, 1) == VE
    assert guest.tdvps.ve_info.exit_reason == ExitReason.MSR_WRITE


@pytest.mark.parametrize(
    ("msr", "value"),
    [(XAPIC_DISABLE_STATUS, 1), (PERF_CAPABILITIES, 0), (VMX_BASIC, 7 << 54)],
)
def test_emulated_msrs_read_what_the_td_is_told(guest: Guest, msr: int, value: int) -> None:
    rip = guest.cpu.rip
    assert rdmsr(guest, msr) == value
    assert (guest.cpu.injected, guest.cpu.rip) == (0, rip + 2)


def test_a_td_without_perfmon_sees_no_performance_monitoring(guest: Guest) -> None:
    guest.module.platform.wrmsr(MISC_ENABLE, 1 << 18 | 1 << 7 | 1)
    assert rdmsr(guest, MISC_ENABLE) == 1 << 18 | 1 << 12 | 1


def test_arch_capabilities_are_the_tds(guest: Guest) -> None:
    guest.tdcs.virtual_ia32_arch_capabilities = 0x1234_5678_9ABC
    assert rdmsr(guest, ARCH_CAPABILITIES) == 0x1234_5678_9ABC


@pytest.mark.parametrize(
    ("change", "event"), [(0, 0), (1 << 0, 0), (1 << 10, 0), (1 << 8, VE), (1 << 11, VE), (1 << 1, VE)]
)
def test_only_syscall_enable_may_change_in_efer(guest: Guest, change: int, event: int) -> None:
    before = guest.cpu.state.efer
    assert wrmsr(guest, EFER, before ^ change) == event
    assert guest.cpu.state.efer == before ^ (change & 1)


@pytest.mark.parametrize(("xfam", "value", "event"), [(3, 0, 0), (3, XFAM_LBR, GP), (3 | XFAM_LBR, XFAM_LBR, 0)])
def test_xss_stays_within_xfam(host: SeamcallHost, xfam: int, value: int, event: int) -> None:
    guest = Guest(host, TdParams(xfam=xfam))
    assert wrmsr(guest, XSS, value) == event
    assert guest.cpu.state.msrs.get(XSS, 0) == (0 if event else value)


@pytest.mark.parametrize(("value", "event"), [(1, 0), (1 << 3, GP), (1 << 16, GP), (1 << 6, VE), (3 << 6, 0)])
def test_debugctl_refuses_traces_without_a_store(guest: Guest, value: int, event: int) -> None:
    assert wrmsr(guest, DEBUGCTL, value) == event
    assert rdmsr(guest, DEBUGCTL) == (0 if event else value)


def test_debugctl_hides_uncore_interrupts(guest: Guest) -> None:
    assert wrmsr(guest, DEBUGCTL, 1 << 13 | 1) == 0
    assert rdmsr(guest, DEBUGCTL) == 1

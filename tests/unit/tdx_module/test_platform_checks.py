"""A platform that is not as TDX needs it fails TDH.SYS.INIT or TDH.SYS.LP.INIT, and says why."""

import pytest

from sim_backend.hw.gprs import R8, R9, R10, RAX, RCX, RDX
from sim_backend.seamcall_host import SeamcallHost
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

MSR_CASES = [
    # MSR, value, status, details
    pytest.param(0x10A, 0x13AFD6A, Status.INCORRECT_MSR_VALUE, 0x10A, id="meltdown_vulnerable"),
    pytest.param(0x10A, 0x13AFD6F, Status.INCORRECT_MSR_VALUE, 0x10A, id="rsba"),
    pytest.param(0xBD, 0, Status.INCORRECT_MSR_VALUE, 0xBD, id="xapic_not_disabled"),
    pytest.param(0xBC, 0, Status.INCORRECT_MSR_VALUE, 0xBC, id="no_energy_filtering"),
    pytest.param(0x345, 5, Status.INCORRECT_MSR_VALUE, 0x345, id="no_full_width_counters"),
    pytest.param(0x1A0, 0x440001, Status.LIMIT_CPUID_MAXVAL_SET, 0, id="cpuid_limited"),
    pytest.param(0x480, 0x80080000000004, Status.INCORRECT_MSR_VALUE, 0x480, id="no_io_exit_info"),
    pytest.param(0x480, 0xC0100000000004, Status.INCORRECT_MSR_VALUE, 0x480, id="vmcs_too_big"),
    pytest.param(0x48D, 0xFFFFFFFE00000000, Status.INCORRECT_MSR_VALUE, 0x48D, id="no_ext_int_exiting"),
    pytest.param(0x48D, 0xFFFFFFFF00000040, Status.INCORRECT_MSR_VALUE, 0x48D, id="unwanted_preemption_timer"),
    pytest.param(0x48B, 0xFFFFFFFD00000000, Status.INCORRECT_MSR_VALUE, 0x48B, id="no_ept"),
    pytest.param(0x492, 0xFFFFFFFFFFFFFF7F, Status.INCORRECT_MSR_VALUE, 0x492, id="no_spec_ctrl_virtualisation"),
    pytest.param(0x485, 0x4004C1E0, Status.INCORRECT_MSR_VALUE, 0x485, id="no_vmwrite_to_any_field"),
    pytest.param(0x48C, 0, Status.INCORRECT_MSR_VALUE, 0x48C, id="no_ept_capabilities"),
    pytest.param(0x486, 0x80000023, Status.INCORRECT_MSR_VALUE, 0x486, id="cr0_demands_mp"),
    pytest.param(0x489, 0x1F72FBF, Status.INCORRECT_MSR_VALUE, 0x489, id="cr4_forbids_mce"),
    pytest.param(0x982, 0x5001600000002, Status.INCORRECT_MSR_VALUE, 0x982, id="tme_not_locked"),
    pytest.param(0x981, 0x3F600000000, Status.INCORRECT_MSR_VALUE, 0x981, id="no_aes_xts"),
    pytest.param(0x87, 0x7E00000020, Status.SUCCESS, 0, id="other_keyid_partitioning"),
    pytest.param(0x87, 2040 << 32 | 8, Status.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, 2048, id="too_many_hkids"),
    pytest.param(0x99, 5, Status.INCORRECT_MSR_VALUE, 0x99, id="wbnoinvdp_differs"),
    pytest.param(0xFE, 0x4508, Status.SMRR_NOT_SUPPORTED, 0, id="no_smrr"),
    pytest.param(0xFE, 0x0D08, Status.SMRR_LOCK_NOT_SUPPORTED, 0, id="no_smrr_lock"),
    pytest.param(0x1F3, 0xFF800800, Status.SMRR_NOT_LOCKED, 0, id="smrr_unlocked"),
    pytest.param(0x1F3, 0xFE800C00, Status.INVALID_SMRR_CONFIGURATION, 0, id="smrr_mask_with_hole"),
    pytest.param(0x1F2, 0xE0001006, Status.INVALID_SMRR_CONFIGURATION, 0, id="smrr_base_not_aligned"),
    pytest.param(0x1F2, 0x40000006, Status.SMRR_OVERLAPS_CMR, 0, id="smrr_in_cmr"),
]


@pytest.mark.parametrize(("msr", "value", "status", "details"), MSR_CASES)
def test_sys_init_checks_an_msr(fresh_host: SeamcallHost, msr: int, value: int, status: Status, details: int) -> None:
    fresh_host.platform.wrmsr(msr, value)
    regs = fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=status)
    assert regs[RAX] == int(Rax(status, details))


CMR_CASES = [
    pytest.param([(0x100000, 0x1000), (0x101000, 0x1000)], Status.SUCCESS, id="touching"),
    pytest.param([(0x100800, 0x1000)], Status.CMR_LIST_INVALID, id="unaligned"),
    pytest.param([(0x100000, 0x800)], Status.CMR_LIST_INVALID, id="odd_size"),
    pytest.param([(0x200000, 0x1000), (0x100000, 0x1000)], Status.CMR_LIST_INVALID, id="descending"),
    pytest.param([(0x100000, 0x2000), (0x101000, 0x1000)], Status.CMR_LIST_INVALID, id="overlapping"),
    pytest.param([(1 << 46, 0x1000)], Status.CMR_LIST_INVALID, id="hkid_bits"),
]


@pytest.mark.parametrize(("cmrs", "status"), CMR_CASES)
def test_sys_init_checks_the_cmrs(fresh_host: SeamcallHost, cmrs: list[tuple[int, int]], status: Status) -> None:
    fresh_host.platform.cmrs = cmrs
    assert fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=status)[RAX] == int(Rax(status))


def set_cpuid(host: SeamcallHost, leaf: int, subleaf: int | None, register: int, value: int) -> None:
    regs = list(host.platform.cpuid[leaf, subleaf])
    regs[register] = value
    host.platform.cpuid[leaf, subleaf] = (regs[0], regs[1], regs[2], regs[3])


def test_sys_init_names_a_wrong_cpuid_value(fresh_host: SeamcallHost) -> None:
    set_cpuid(fresh_host, 0xD, 1, 0, 0xE)  # no XSAVEOPT
    regs = fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=Status.INCORRECT_CPUID_VALUE)
    assert regs[RCX] == 0x1_0000_000D
    assert (regs[RDX], regs[R8]) == (0xF, 0x1800)
    assert (regs[R9], regs[R10]) == (0xF, 0x1800)


CPUID_CASES = [
    pytest.param(0x0, None, 0, 0x1E, Rax(Status.CPUID_LEAF_NOT_SUPPORTED, 0x1F), id="too_few_leaves"),
    pytest.param(0x80000000, None, 0, 0x80000007, Rax(Status.CPUID_LEAF_NOT_SUPPORTED, 0x80000008), id="no_maxpa"),
    pytest.param(0xA, None, 0, 0x08300804, Rax(Status.INCORRECT_CPUID_VALUE), id="old_perfmon"),
    pytest.param(0xA, None, 3, 0x8608, Rax(Status.INCORRECT_CPUID_VALUE), id="many_fixed_counters"),
    pytest.param(0x15, None, 1, 0, Rax(Status.CPUID_LEAF_NOT_SUPPORTED, 0x15), id="no_tsc_frequency"),
    pytest.param(0x1F, 1, 2, 0x101, Rax(Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED), id="level_twice"),
    pytest.param(0x4, 3, 0, 0x4163, Rax(Status.INVALID_WBINVD_SCOPE), id="l3_not_per_package"),
    pytest.param(0x80000008, None, 0, 0x3034, Rax(Status.INCORRECT_CPUID_VALUE), id="la57_without_57_bits"),
]


@pytest.mark.parametrize(("leaf", "subleaf", "register", "value", "expected"), CPUID_CASES)
def test_sys_init_checks_cpuid(
    fresh_host: SeamcallHost, leaf: int, subleaf: int | None, register: int, value: int, expected: Rax
) -> None:
    set_cpuid(fresh_host, leaf, subleaf, register, value)
    assert fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=expected.status)[RAX] == int(expected)


def test_a_failed_sys_init_can_be_repeated(fresh_host: SeamcallHost) -> None:
    fresh_host.platform.rand_fail = 1
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=Status.RND_NO_ENTROPY)
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT)


def test_sys_init_needs_the_seamops_of_td_preserving_updates(fresh_host: SeamcallHost) -> None:
    fresh_host.platform.seamops_capabilities = 0x3
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT, accept=Status.INCOMPATIBLE_SEAM_CAPABILITIES)


@pytest.mark.parametrize("msr", [0xCF, 0x10A, 0x3B, 0xFE, 0x1F3, 0x480, 0x490, 0x345, 0x982, 0x99])
def test_lp_init_finds_the_lp_that_differs(fresh_host: SeamcallHost, msr: int) -> None:
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT)
    fresh_host.platform.wrmsr(msr, fresh_host.platform.rdmsr(1, msr) ^ 1 << 40, 1)
    fresh_host.call(SeamcallLeaf.TDH_SYS_LP_INIT, lp=0)
    regs = fresh_host.call(SeamcallLeaf.TDH_SYS_LP_INIT, lp=1, accept=Status.INCONSISTENT_MSR)
    assert regs[RAX] == int(Rax(Status.INCONSISTENT_MSR, msr))


def test_lp_init_names_a_cpuid_field_that_differs(fresh_host: SeamcallHost) -> None:
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT)
    eax, ebx, ecx, edx = fresh_host.platform.cpuid_regs(7, 0)
    fresh_host.platform.lps[2].cpuid[7, 0] = (eax, ebx ^ 1, ecx, edx)
    regs = fresh_host.call(SeamcallLeaf.TDH_SYS_LP_INIT, lp=2, accept=Status.INCONSISTENT_CPUID_FIELD)
    assert regs[RCX] == 7
    assert (regs[RDX], regs[R8]) == (0xFFFFFFFBFFFFFFFF, 0xFFEBFFFFBFC1FF6F)


def test_an_lp_without_entropy_can_be_initialised_later(fresh_host: SeamcallHost) -> None:
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT)
    fresh_host.platform.rand_fail = 1
    fresh_host.call(SeamcallLeaf.TDH_SYS_LP_INIT, accept=Status.RND_NO_ENTROPY)
    fresh_host.call(SeamcallLeaf.TDH_SYS_LP_INIT)


def test_the_module_is_ready_only_when_every_package_has_the_key(fresh_host: SeamcallHost) -> None:
    fresh_host.configure()
    fresh_host.call(SeamcallLeaf.TDH_SYS_KEY_CONFIG, lp=0)
    fresh_host.call(SeamcallLeaf.TDH_MNG_CREATE, rcx=1 << 30, rdx=40, accept=Status.SYS_NOT_READY)
    fresh_host.call(SeamcallLeaf.TDH_SYS_KEY_CONFIG, lp=2)
    fresh_host.call(SeamcallLeaf.TDH_MNG_CREATE, rcx=1 << 30, rdx=40, accept=Status.OPERAND_ADDR_RANGE_ERROR)


def test_the_bulk_initialisation_of_a_tdmr_needs_a_ready_module(fresh_host: SeamcallHost) -> None:
    fresh_host.configure()
    with pytest.raises(LookupError, match="not ready"):
        fresh_host.module.tdmr_init_all(1 << 30)


def test_the_bulk_initialisation_of_a_tdmr_equals_the_leaf(fresh_host: SeamcallHost) -> None:
    fresh_host.configure()
    for lp in (0, 2):
        fresh_host.call(SeamcallLeaf.TDH_SYS_KEY_CONFIG, lp=lp)
    calls = 0
    while True:
        regs = fresh_host.call(SeamcallLeaf.TDH_SYS_TDMR_INIT, rcx=1 << 30)
        calls += 1
        if regs[RDX] == 2 << 30:
            break
    assert fresh_host.module.tdmr_init_all(2 << 30) == (calls, 3 << 30)
    for page in (1 << 30, 2 << 30, (3 << 30) - 4096):
        assert fresh_host.call(SeamcallLeaf.TDH_PHYMEM_PAGE_RDMD, rcx=page)[RCX] == 0
    with pytest.raises(LookupError, match="no TDMR"):
        fresh_host.module.tdmr_init_all(3 << 30)


SEAMRR, HKID_5 = 0xF000_0000, 5 << 46


@pytest.mark.parametrize("hpa", [SEAMRR, SEAMRR | HKID_5, (SEAMRR + 0x1FF_F000) | HKID_5, 32 << 46, 1 << 52])
def test_no_shared_hkid_makes_the_seam_range_shared_memory(fresh_host: SeamcallHost, hpa: int) -> None:
    fresh_host.configure()
    leaf = SeamcallLeaf.TDH_SYS_INFO
    regs = fresh_host.call(leaf, rcx=hpa, rdx=1024, r8=1 << 20, r9=32, accept=Status.OPERAND_INVALID)
    assert regs[RAX] == int(Rax(Status.OPERAND_INVALID, Operand.RCX))


def test_key_ids_beyond_the_address_width_leave_it_as_it_is(fresh_host: SeamcallHost) -> None:
    fresh_host.platform.wrmsr(0x87, 126 << 32 | 100)
    fresh_host.configure()
    regs = fresh_host.call(
        SeamcallLeaf.TDH_SYS_INFO, rcx=1 << 52, rdx=1024, r8=1 << 20, r9=32, accept=Status.OPERAND_INVALID
    )
    assert regs[RAX] == int(Rax(Status.OPERAND_INVALID, Operand.RCX))


def test_the_number_of_hkids_is_a_32_bit_sum(fresh_host: SeamcallHost) -> None:
    fresh_host.platform.wrmsr(0x87, 33 << 32 | 0xFFFF_FFFF)
    fresh_host.call(SeamcallLeaf.TDH_SYS_INIT)
    module = fresh_host.module
    assert (module.first_private_hkid, module.last_private_hkid) == (0, 32)

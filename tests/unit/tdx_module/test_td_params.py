"""TD_PARAMS: what TDH.MNG.INIT refuses, in which order, and what an accepted one makes of the TD."""

from collections.abc import Callable
from struct import pack_into

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.hw.gprs import RAX, RCX, RDX, new_gprs
from sim_backend.seamcall_host import EPTP_5_LEVEL, SeamcallHost, Td, TdParams
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.td_params import ATTR_DEBUG, is_xcr0_allowed, is_xfam_allowed, tsc_parameters
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

BUFFER = 8 << 20
ALL_XFAM = 0x0006_DBE7
IA32_TSC_ADJUST = 0x3B


@pytest.fixture
def td(host: SeamcallHost) -> Td:
    return host.create_td(init=False)


def init(host: SeamcallHost, td: Td, change: Callable[[bytearray], None] | None = None) -> Rax:
    data = bytearray(TdParams().encode())
    if change is not None:
        change(data)
    host.module.memory.write(BUFFER, bytes(data))
    regs = new_gprs()
    regs[RAX], regs[RCX], regs[RDX] = SeamcallLeaf.TDH_MNG_INIT, td.tdr, BUFFER
    assert not host.module.seamcall(0, regs)
    return Rax.decode(regs[RAX])


# In the module's order: (offset, format, bad value, operand).
CHECKS = [
    pytest.param(0, "<Q", 1 << 5, Operand.ATTRIBUTES, id="attributes"),
    pytest.param(8, "<Q", 0, Operand.XFAM, id="xfam"),
    pytest.param(16, "<H", 0, Operand.MAX_VCPUS, id="max_vcpus"),
    pytest.param(18, "<B", 4, Operand.NUM_L2_VMS, id="num_l2_vms"),
    pytest.param(20, "<I", 1, Operand.RDX, id="reserved_20"),
    pytest.param(32, "<Q", 1 << 9, Operand.EXEC_CONTROLS, id="config_flags"),
    pytest.param(24, "<Q", 0x1F, Operand.EPTP_CONTROLS, id="eptp_controls"),
    pytest.param(40, "<H", 3, Operand.TSC_FREQUENCY, id="tsc_frequency"),
    pytest.param(42, "<H", 1, Operand.RDX, id="reserved_42"),
    pytest.param(0x100 + 16 * 6 + 4, "<I", 1, Operand.CPUID_CONFIG, id="cpuid_config"),
    pytest.param(1020, "<I", 1, Operand.RDX, id="reserved_1020"),
]


@pytest.mark.parametrize(("offset", "form", "value", "operand"), CHECKS)
def test_a_bad_field_is_named_and_leaves_the_td_uninitialised(
    host: SeamcallHost, td: Td, offset: int, form: str, value: int, operand: Operand
) -> None:
    status = init(host, td, lambda data: pack_into(form, data, offset, value))
    assert status == Rax(Status.OPERAND_INVALID, operand)
    assert host.module.tdrs[td.tdr].tdcs.op_state == OpState.UNINITIALIZED
    assert init(host, td) == Rax(Status.SUCCESS)
    assert host.module.tdrs[td.tdr].tdcs.op_state == OpState.INITIALIZED


@pytest.mark.parametrize("first", range(len(CHECKS)))
def test_of_several_bad_fields_the_first_is_named(host: SeamcallHost, td: Td, first: int) -> None:
    def break_all(data: bytearray) -> None:
        for check in CHECKS[first:]:
            offset, form, value, _ = check.values
            pack_into(str(form), data, int(str(offset)), value)

    assert init(host, td, break_all) == Rax(Status.OPERAND_INVALID, int(str(int(CHECKS[first].values[3]))))  # type: ignore[call-overload]


def test_an_initialised_td_cannot_be_initialised_again(host: SeamcallHost, td: Td) -> None:
    assert init(host, td) == Rax(Status.SUCCESS)
    assert init(host, td) == Rax(Status.OP_STATE_INCORRECT)


def test_l2_vms_need_tdcs_pages_of_their_own(host: SeamcallHost, td: Td) -> None:
    assert init(host, td, lambda data: pack_into("<B", data, 18, 1)) == Rax(Status.TDCS_NOT_ALLOCATED)


def test_five_level_paging_needs_a_wide_gpa(host: SeamcallHost, td: Td) -> None:
    status = init(host, td, lambda data: pack_into("<Q", data, 32, 1))
    assert status == Rax(Status.OPERAND_INVALID, Operand.EPTP_CONTROLS)
    host.init_td(td, TdParams(eptp_controls=EPTP_5_LEVEL, config_flags=1))
    assert host.module.tdrs[td.tdr].tdcs.gpaw


@pytest.mark.parametrize(("maxpa", "allowed"), [(48, False), (49, True)])
def test_five_level_paging_needs_49_physical_address_bits(
    host: SeamcallHost, td: Td, maxpa: int, allowed: bool
) -> None:
    host.platform.maxpa = maxpa
    status = init(host, td, lambda data: pack_into("<Q", data, 24, EPTP_5_LEVEL))
    assert (status == Rax(Status.SUCCESS)) == allowed
    assert allowed or status == Rax(Status.OPERAND_INVALID, Operand.EPTP_CONTROLS)


def test_a_moved_tsc_is_noticed(host: SeamcallHost, td: Td) -> None:
    host.platform.wrmsr(IA32_TSC_ADJUST, 1)
    assert init(host, td) == Rax(Status.INCONSISTENT_MSR, IA32_TSC_ADJUST)


def test_the_owners_fields_are_kept(host: SeamcallHost, td: Td) -> None:
    def fill(data: bytearray) -> None:
        data[0x50:0xE0] = bytes(range(48)) + bytes(range(100, 148)) + bytes(range(200, 248))
        pack_into("<Q", data, 0, ATTR_DEBUG)

    assert init(host, td, fill) == Rax(Status.SUCCESS)
    tdcs = host.module.tdrs[td.tdr].tdcs
    assert (tdcs.mrconfigid, tdcs.mrowner) == (bytes(range(48)), bytes(range(100, 148)))
    assert tdcs.mrownerconfig == bytes(range(200, 248))
    assert tdcs.is_debug


@given(st.integers(0, 2**20 - 1))
def test_an_allowed_xfam_has_whole_features_on_top_of_x87_and_sse(xfam: int) -> None:
    if is_xfam_allowed(xfam, ALL_XFAM):
        assert xfam & 3 == 3
        assert not xfam & ~ALL_XFAM
        assert xfam & 0xE0 in (0, 0xE0)
        assert not xfam & 0xE0 or xfam & 4
        assert xfam & 0x1800 in (0, 0x1800)
        assert xfam & 0x6_0000 in (0, 0x6_0000)


@given(xfam=st.sampled_from([3, 7, 0xE7, 0x600E7]), xcr0=st.integers(0, 2**20 - 1))
def test_an_allowed_xcr0_is_within_xfam(xfam: int, xcr0: int) -> None:
    if is_xcr0_allowed(xcr0, xfam, ALL_XFAM):
        assert not xcr0 & ~xfam
        assert xcr0 & 1
    assert is_xcr0_allowed(xfam, xfam, ALL_XFAM)


@given(frequency=st.integers(4, 400), native=st.integers(10**8, 10**10), now=st.integers(0, 2**50))
def test_the_virtual_tsc_starts_at_zero_and_runs_at_its_frequency(frequency: int, native: int, now: int) -> None:
    multiplier, offset = tsc_parameters(now, native, frequency)

    def virtual(tsc: int) -> int:
        return (tsc * multiplier >> 48) + offset & (1 << 64) - 1

    assert virtual(now) == 0
    later = virtual(now + native)  # a second
    assert later == pytest.approx(frequency * 25_000_000, rel=1e-6)

"""KVM_TDX_CAPABILITIES: what may be configured, and how it says that a buffer is too small."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import SEPT_VE_DISABLE, XFAM_X87_SSE, TrustDomain
from uapi_ctypes.dialect import Dialect
from uapi_ctypes.tdx_v17 import NO_SUB_LEAF

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
UNMAPPED = 0x1000


def test_a_buffer_that_is_too_small_is_e2big_and_the_count_stays(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    small = dialect.capabilities.allocate(1)

    with fails_with(errno.E2BIG):
        td.vm.tdx_command(dialect.capabilities_command, small)
    assert small.count == 1, "the kernel does not say how many entries it needs"


def test_the_count_is_exact_whatever_the_room(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    exact = td.capabilities().count

    assert td.vm.tdx_capabilities(exact).count == exact
    with fails_with(errno.E2BIG):
        td.vm.tdx_capabilities(exact - 1)


def test_flags_must_be_zero(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.tdx_command(dialect.capabilities_command, dialect.capabilities.allocate(256), flags=1)


def test_flags_are_checked_before_the_pointer(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.tdx_command(dialect.capabilities_command, UNMAPPED, flags=1)


def test_an_unreadable_buffer_is_efault(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EFAULT):
        td.vm.tdx_command(dialect.capabilities_command, UNMAPPED)


def test_the_answer_does_not_depend_on_the_td_s_state(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    before = bytes(td.capabilities())
    count = td.capabilities().count

    td.init_vm()

    assert bytes(td.vm.tdx_capabilities(count)) == before[: len(bytes(td.vm.tdx_capabilities(count)))]


@pytest.mark.dialects("mainline")
def test_sept_ve_disable_is_the_only_attribute_offered(trust_domain: MAKE_TD) -> None:
    assert trust_domain().create().capabilities().supported_attrs == SEPT_VE_DISABLE


@pytest.mark.dialects("mainline")
def test_x87_and_sse_are_in_the_supported_xfam(trust_domain: MAKE_TD) -> None:
    assert trust_domain().create().capabilities().supported_xfam & XFAM_X87_SSE == XFAM_X87_SSE


@pytest.mark.dialects("mainline")
def test_the_guest_s_address_width_is_configurable_as_a_whole(trust_domain: MAKE_TD) -> None:
    entries = trust_domain().create().capabilities().filled()

    widths = [entry.eax >> 16 & 0xFF for entry in entries if entry.function == 0x8000_0008]
    assert widths == [0xFF]


@pytest.mark.dialects("mainline")
def test_no_entry_says_that_its_index_is_significant(trust_domain: MAKE_TD) -> None:
    """A trap for user space: echoed back into INIT_VM such an entry matches every sub-leaf."""
    entries = trust_domain().create().capabilities().filled()

    assert {entry.flags for entry in entries} == {0}


@pytest.mark.dialects("mainline")
def test_what_would_corrupt_the_host_is_not_offered(trust_domain: MAKE_TD) -> None:
    """HLE and RTM (leaf 7 EBX 4 and 11) and WAITPKG (leaf 7 ECX 5): TSX_CTRL and UMWAIT would be the host's."""
    entries = trust_domain().create().capabilities().filled()

    leaf_7 = [entry for entry in entries if (entry.function, entry.index) == (7, 0)]
    assert all(not entry.ebx & (1 << 4 | 1 << 11) and not entry.ecx & 1 << 5 for entry in leaf_7)


@pytest.mark.dialects("mainline")
def test_setup_event_notify_is_left_to_user_space(trust_domain: MAKE_TD) -> None:
    capabilities = trust_domain().create().capabilities()

    assert capabilities.user_tdvmcallinfo_1_r11 & 1 << 1
    assert capabilities.kernel_tdvmcallinfo_1_r11 == 0


@pytest.mark.dialects("v17")
def test_a_bit_that_must_be_one_may_be_one(trust_domain: MAKE_TD) -> None:
    capabilities = trust_domain().create().capabilities()

    assert capabilities.attrs_fixed1 & ~capabilities.attrs_fixed0 == 0
    assert capabilities.xfam_fixed1 & ~capabilities.xfam_fixed0 == 0
    assert capabilities.xfam_fixed1 & XFAM_X87_SSE == XFAM_X87_SSE


@pytest.mark.dialects("v17")
def test_supported_gpaw_is_2_by_a_slip_of_precedence(trust_domain: MAKE_TD) -> None:
    assert trust_domain().create().capabilities().supported_gpaw == 2


@pytest.mark.dialects("v17")
def test_a_leaf_without_sub_leaves_says_so(trust_domain: MAKE_TD) -> None:
    configs = trust_domain().create().capabilities().filled()

    assert NO_SUB_LEAF in {config.sub_leaf for config in configs}

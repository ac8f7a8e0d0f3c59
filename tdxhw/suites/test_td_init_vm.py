"""KVM_TDX_INIT_VM: every check in its order, and what the TDX module itself refuses."""

import ctypes
import errno
from collections.abc import Callable
from typing import Any

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import SEPT_VE_DISABLE, TrustDomain
from uapi_ctypes.dialect import Dialect
from uapi_ctypes.kvm_state import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KvmCpuidEntry2
from uapi_ctypes.tdx_status import Operand, Status

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
UNMAPPED = 0x1000
UNSUPPORTED_ATTRIBUTE = 1 << 1
UNSUPPORTED_XFAM = 1 << 62
PHYS_ADDR_LEAF = 0x8000_0008


def with_entries(dialect: Dialect, argument: Any, change: Callable[[list[KvmCpuidEntry2]], None]) -> Any:
    """Return `argument` with its CPUID entries changed."""
    entries = argument.filled()
    change(entries)
    changed = dialect.init_vm.of(entries)
    changed.attributes = argument.attributes
    if dialect.xfam_in_init_vm:
        changed.xfam = argument.xfam
    return changed


def test_initialises_a_td_once(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.init_vm()

    with fails_with(errno.EINVAL):
        td.init_vm()


@pytest.mark.parametrize("gpaw", [48, 52])
def test_accepts_both_address_widths(trust_domain: MAKE_TD, gpaw: int) -> None:
    td = trust_domain(gpaw=gpaw).create()
    td.init_vm()

    assert td.shared_bit == 1 << gpaw - 1


def test_accepts_sept_ve_disable(trust_domain: MAKE_TD) -> None:
    trust_domain(attributes=SEPT_VE_DISABLE).create().init_vm()


def test_flags_must_be_zero(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(td.init_vm_argument(), flags=1)


def test_flags_are_checked_before_the_pointer(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.tdx_command(dialect.init_vm_command, UNMAPPED, flags=1)


def test_an_unreadable_argument_is_efault(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EFAULT):
        td.vm.tdx_command(dialect.init_vm_command, UNMAPPED)


def test_more_than_256_cpuid_entries_are_e2big(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.E2BIG):
        td.vm.tdx_init_vm(dialect.init_vm.allocate(257))


def test_the_number_of_entries_is_checked_before_reserved_words(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    argument = dialect.init_vm.allocate(257)
    argument.reserved[0] = 1

    with fails_with(errno.E2BIG):
        td.vm.tdx_init_vm(argument)


@pytest.mark.parametrize("word", [0, 11], ids=["first", "a later one"])
def test_reserved_words_must_be_zero(trust_domain: MAKE_TD, word: int) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.reserved[word] = 1

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


def test_the_cpuid_padding_must_be_zero(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.cpuid.padding = 1

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_kvm_refuses_an_attribute_it_does_not_support(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.attributes = UNSUPPORTED_ATTRIBUTE

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("v17")
def test_the_module_refuses_an_attribute_that_must_be_zero(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.attributes |= UNSUPPORTED_ATTRIBUTE

    with fails_with(errno.EINVAL, Status.OPERAND_INVALID, Operand.ATTRIBUTES):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_kvm_refuses_an_xfam_bit_it_does_not_support(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.xfam |= UNSUPPORTED_XFAM

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
@pytest.mark.parametrize("width", [0, 47, 49, 51, 57])
def test_no_other_address_width_exists(trust_domain: MAKE_TD, width: int) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    for entry in argument.entries:
        if entry.function == PHYS_ADDR_LEAF:
            entry.eax = entry.eax & ~0xFF_0000 | width << 16

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_the_leaf_with_the_address_width_is_mandatory(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    def drop(entries: list[KvmCpuidEntry2]) -> None:
        entries[:] = [entry for entry in entries if entry.function != PHYS_ADDR_LEAF]

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(with_entries(dialect, td.init_vm_argument(), drop))


@pytest.mark.dialects("mainline")
def test_a_leaf_that_cannot_be_configured_is_refused(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    argument = with_entries(
        dialect, td.init_vm_argument(), lambda entries: entries.append(KvmCpuidEntry2(0x4000_0000, 0, 0))
    )

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_a_leaf_given_twice_is_refused(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    argument = with_entries(dialect, td.init_vm_argument(), lambda entries: entries.append(entries[0]))

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_one_entry_without_significant_index_matches_every_sub_leaf(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    """The count of matches then exceeds the count of entries."""
    td = trust_domain().create()
    functions = [entry.function for entry in td.capabilities().filled()]
    repeated = next((function for function in functions if functions.count(function) > 1), None)
    assert repeated is not None, "the module has no configurable leaf with sub-leaves"

    def merge(entries: list[KvmCpuidEntry2]) -> None:
        entries[:] = [entry for entry in entries if entry.function != repeated]
        entries.append(KvmCpuidEntry2(repeated, 0, 0))

    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(with_entries(dialect, td.init_vm_argument(), merge))


@pytest.mark.dialects("mainline")
def test_a_configurable_leaf_may_be_left_out(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    def only_the_width(entries: list[KvmCpuidEntry2]) -> None:
        entries[:] = [entry for entry in entries if entry.function == PHYS_ADDR_LEAF]

    td.vm.tdx_init_vm(with_entries(dialect, td.init_vm_argument(), only_the_width))


@pytest.mark.dialects("v17")
def test_a_leaf_that_cannot_be_configured_is_ignored(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    argument = with_entries(
        dialect, td.init_vm_argument(), lambda entries: entries.append(KvmCpuidEntry2(0x4000_0000, 0, 0, 1))
    )

    td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_the_module_refuses_a_cpuid_bit_outside_the_configurable_ones(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    """KVM does not look at values: MNG.INIT does, and hw_error says so."""
    td = trust_domain().create()
    argument = td.init_vm_argument()
    spoil_a_fixed_bit(td, argument)

    with fails_with(errno.EINVAL, Status.OPERAND_INVALID, Operand.CPUID_CONFIG):
        td.vm.tdx_init_vm(argument)


@pytest.mark.dialects("mainline")
def test_a_retry_with_the_same_command_fails_on_its_hw_error(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    good = ctypes.string_at(ctypes.addressof(argument), ctypes.sizeof(argument))
    spoil_a_fixed_bit(td, argument)
    cmd = dialect.cmd(dialect.init_vm_command.id, 0, ctypes.addressof(argument))
    with fails_with(errno.EINVAL, Status.OPERAND_INVALID, Operand.CPUID_CONFIG):
        td.vm.memory_encrypt_op(cmd)
    ctypes.memmove(ctypes.addressof(argument), good, len(good))

    with fails_with(errno.EINVAL):
        td.vm.memory_encrypt_op(cmd)
    cmd.hw_error = 0
    td.vm.memory_encrypt_op(cmd)


def spoil_a_fixed_bit(td: TrustDomain, argument: Any) -> None:
    """Set a CPUID bit that the module does not let anyone configure."""
    for mask, entry in zip(td.capabilities().filled(), argument.entries, strict=True):
        if mask.function != PHYS_ADDR_LEAF and mask.edx != 0xFFFF_FFFF:
            entry.edx |= ~mask.edx & 0xFFFF_FFFF & -(~mask.edx & 0xFFFF_FFFF)  # the lowest such bit
            return
    pytest.fail("every bit of every leaf is configurable")


def test_the_module_refuses_a_tsc_frequency_below_4_units_of_25_mhz(trust_domain: MAKE_TD) -> None:
    """KVM checks its own upper limit only."""
    td = trust_domain().create()
    td.vm.set_tsc_khz(75_000)

    with fails_with(errno.EINVAL, Status.OPERAND_INVALID, Operand.TSC_FREQUENCY):
        td.init_vm()


def test_a_refused_td_can_be_initialised_after_all(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    argument = td.init_vm_argument()
    argument.reserved[0] = 1
    with fails_with(errno.EINVAL):
        td.vm.tdx_init_vm(argument)

    td.init_vm()


@pytest.mark.dialects("mainline")
def test_a_vcpu_cannot_be_created_before(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EIO):
        td.create_vcpu()


@pytest.mark.dialects("v17")
def test_a_vcpu_created_before_makes_it_ebusy(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.create_vcpu()

    with fails_with(errno.EBUSY):
        td.init_vm()


@pytest.mark.dialects("mainline")
def test_every_entry_of_the_argument_says_that_its_index_is_significant(trust_domain: MAKE_TD) -> None:
    """This harness's own duty, see the trap in the capabilities."""
    td = trust_domain().create()

    assert {entry.flags for entry in td.init_vm_argument().filled()} == {KVM_CPUID_FLAG_SIGNIFCANT_INDEX}

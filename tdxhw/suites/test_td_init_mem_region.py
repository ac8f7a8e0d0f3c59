"""KVM_TDX_INIT_MEM_REGION: bad order, bad arguments, and how far it got when it fails half-way."""

import errno
from collections.abc import Callable, Iterator

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import TrustDomain
from uapi_ctypes.dialect import CommandFd, Dialect
from uapi_ctypes.mapping import Mapping, anonymous
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion
from uapi_ctypes.units import PAGE_SIZE

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
GPA = 1 << 30
UNMAPPED = 0x1000
SLOT_PAGES = 4


@pytest.fixture
def source() -> Iterator[Mapping]:
    with anonymous(8 * PAGE_SIZE) as mapping:
        mapping.memory[:] = b"\x5a" * mapping.length
        yield mapping


@pytest.fixture
def td(trust_domain: MAKE_TD) -> TrustDomain:
    """Return a TD with one vCPU and four private pages at GPA 1 GiB, ready to be filled."""
    built = trust_domain().build()
    built.add_slot(GPA, SLOT_PAGES * PAGE_SIZE)
    return built


def test_adds_pages_and_says_that_nothing_is_left(td: TrustDomain, source: Mapping) -> None:
    region = KvmTdxInitMemRegion(source.address, GPA, SLOT_PAGES)

    td.vcpus[0].tdx_init_mem_region(region)

    size = SLOT_PAGES * PAGE_SIZE
    assert (region.source_addr, region.gpa, region.nr_pages) == (source.address + size, GPA + size, 0)


def test_flags_beyond_measure_are_einval(td: TrustDomain, source: Mapping) -> None:
    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1), flags=2)


def test_an_unreadable_region_is_efault(td: TrustDomain, dialect: Dialect) -> None:
    command = dialect.init_mem_region

    with fails_with(errno.EFAULT):
        if command.fd is CommandFd.VCPU:
            td.vcpus[0].tdx_command(command, UNMAPPED)
        else:
            td.vm.tdx_command(command, UNMAPPED)


def test_flags_are_checked_before_the_pointer(td: TrustDomain, dialect: Dialect) -> None:
    command = dialect.init_mem_region

    with fails_with(errno.EINVAL):
        if command.fd is CommandFd.VCPU:
            td.vcpus[0].tdx_command(command, UNMAPPED, flags=2)
        else:
            td.vm.tdx_command(command, UNMAPPED, flags=2)


@pytest.mark.parametrize(
    ("source_offset", "gpa", "nr_pages"),
    [
        pytest.param(1, GPA, 1, id="source unaligned"),
        pytest.param(0, GPA + 0x800, 1, id="gpa unaligned"),
        pytest.param(0, GPA, 0, id="no pages"),
        pytest.param(0, (1 << 64) - PAGE_SIZE, 2, id="range wraps"),
        pytest.param(0, 1 << 47 | GPA, 1, id="gpa shared"),
        pytest.param(0, (1 << 47) - PAGE_SIZE, 2, id="last page shared"),
        pytest.param(0, GPA, 1 << 52, id="2^52 pages"),
    ],
)
def test_refuses_a_region(td: TrustDomain, source: Mapping, source_offset: int, gpa: int, nr_pages: int) -> None:
    region = KvmTdxInitMemRegion(source.address + source_offset, gpa, nr_pages)
    before = bytes(region)

    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_init_mem_region(region)
    assert bytes(region) == before, "a region that was refused as a whole is not written back"


def test_after_finalize_it_is_einval(td: TrustDomain, source: Mapping) -> None:
    td.finalize()

    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))


@pytest.mark.dialects("mainline")
def test_on_a_vcpu_that_was_never_initialised_it_is_einval(trust_domain: MAKE_TD, source: Mapping) -> None:
    td = trust_domain().create()
    td.init_vm()
    td.add_slot(GPA, PAGE_SIZE)

    with fails_with(errno.EINVAL):
        td.create_vcpu().tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))


@pytest.mark.dialects("v17")
def test_without_a_vcpu_it_is_einval(trust_domain: MAKE_TD, source: Mapping, dialect: Dialect) -> None:
    td = trust_domain().create()
    td.init_vm()
    td.add_slot(GPA, PAGE_SIZE)

    with fails_with(errno.EINVAL):
        td.vm.tdx_command(dialect.init_mem_region, KvmTdxInitMemRegion(source.address, GPA, 1))


def test_a_source_that_is_not_mapped_is_efault(td: TrustDomain) -> None:
    with fails_with(errno.EFAULT):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(UNMAPPED, GPA, 1))


def test_a_gpa_without_slot(td: TrustDomain, source: Mapping, dialect: Dialect) -> None:
    expected = {"mainline": errno.EINVAL, "v17": errno.EIO}[dialect.name]

    with fails_with(expected):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, 2 * GPA, 1))


def test_a_page_whose_attribute_is_shared(td: TrustDomain, source: Mapping, dialect: Dialect) -> None:
    td.set_private(GPA, PAGE_SIZE, private=False)
    expected = {"mainline": errno.EINVAL, "v17": errno.EIO}[dialect.name]

    with fails_with(expected):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))


@pytest.mark.dialects("mainline")
def test_a_slot_without_guest_memfd_is_einval(td: TrustDomain, source: Mapping) -> None:
    td.add_slot(2 * GPA, PAGE_SIZE, private=False)
    td.set_private(2 * GPA, PAGE_SIZE, private=True)

    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, 2 * GPA, 1))


def test_failing_half_way_shows_how_far_it_got(td: TrustDomain, source: Mapping, dialect: Dialect) -> None:
    """The slot ends after four pages; v17 says EAGAIN for every failure after the first page."""
    region = KvmTdxInitMemRegion(source.address, GPA, SLOT_PAGES + 1)
    expected = {"mainline": errno.EINVAL, "v17": errno.EAGAIN}[dialect.name]

    with fails_with(expected):
        td.vcpus[0].tdx_init_mem_region(region)
    size = SLOT_PAGES * PAGE_SIZE
    assert (region.source_addr, region.gpa, region.nr_pages) == (source.address + size, GPA + size, 1)


@pytest.mark.dialects("mainline")
def test_the_same_page_twice_fails_and_the_td_survives(td: TrustDomain, source: Mapping) -> None:
    """EEXIST in Linux 6.16, EIO since; the VM is not bugged either way."""
    td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))

    with pytest.raises(OSError) as error:
        td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))
    assert error.value.errno in (errno.EIO, errno.EEXIST)
    td.finalize()


@pytest.mark.dialects("v17")
def test_the_same_page_twice_counts_as_done(td: TrustDomain, source: Mapping) -> None:
    td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))
    region = KvmTdxInitMemRegion(source.address, GPA, 1)

    td.vcpus[0].tdx_init_mem_region(region)
    assert region.nr_pages == 0


def test_a_page_can_be_added_again_after_a_round_trip_to_shared(td: TrustDomain, source: Mapping) -> None:
    td.vcpus[0].tdx_init_mem_region(KvmTdxInitMemRegion(source.address, GPA, 1))
    td.set_private(GPA, PAGE_SIZE, private=False)
    td.set_private(GPA, PAGE_SIZE, private=True)
    region = KvmTdxInitMemRegion(source.address, GPA, 1)

    td.vcpus[0].tdx_init_mem_region(region)
    assert region.nr_pages == 0

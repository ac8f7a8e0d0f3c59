"""The platform: processors, MSRs with per-LP values, CPUID, ranges, KeyIDs, randomness."""

import pytest

from sim_backend.hw.keys import KeyIds
from sim_backend.hw.lp import logical_processors
from sim_backend.hw.platform import Platform, load_platform


@pytest.fixture
def platform() -> Platform:
    return load_platform("golden")


def test_the_golden_platform_is_the_recorders_machine(platform: Platform) -> None:
    assert platform.ram_bytes == 4 << 30
    assert [lp.package for lp in platform.lps] == [0, 0, 1, 1]
    assert [lp.x2apic_id for lp in platform.lps] == [0, 2, 4, 6]
    assert platform.packages == 2
    assert platform.seamrr == (0xF000_0000, 32 << 20)
    assert platform.smrr == (0xE000_0000, 8 << 20)
    assert platform.keyids == KeyIds(bits=6, num_mktme=31, num_tdx=32)
    assert (platform.keyids.first_private, platform.keyids.last_private) == (32, 63)
    assert platform.keyids.start_bit == 46
    assert platform.keyids.is_private(32)
    assert not platform.keyids.is_private(31)


def test_each_loaded_platform_is_its_own(platform: Platform) -> None:
    platform.wrmsr(0x10A, 1)
    platform.cpuid[1, None] = (0, 0, 0, 0)
    other = load_platform("golden")
    assert other.rdmsr(0, 0x10A) != 1
    assert other.cpuid_regs(1) != (0, 0, 0, 0)


def test_an_unknown_platform_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        load_platform("none")


def test_an_lp_may_have_an_msr_value_of_its_own(platform: Platform) -> None:
    platform.wrmsr(0x3B, 5, lp=2)
    assert [platform.rdmsr(lp, 0x3B) for lp in range(4)] == [0, 0, 5, 0]
    platform.wrmsr(0x3B, 7)
    assert [platform.rdmsr(lp, 0x3B) for lp in range(4)] == [7, 7, 7, 7]


def test_an_msr_that_the_profile_lacks_reads_as_zero(platform: Platform) -> None:
    assert platform.rdmsr(0, 0x1234) == 0


def test_cpuid_ignores_the_subleaf_where_a_leaf_has_none(platform: Platform) -> None:
    assert platform.cpuid_regs(1, 77) == platform.cpuid_regs(1)
    assert platform.cpuid_regs(0x1D, 1) != platform.cpuid_regs(0x1D, 0)
    assert platform.cpuid_regs(0x99) == (0, 0, 0, 0)


def test_failing_randomness_comes_back(platform: Platform) -> None:
    platform.rand_fail = 2
    assert platform.rdrand() is None
    assert platform.rdrand() is None
    first, second = platform.rdrand(), platform.rdrand()
    assert first is not None
    assert first != second


def test_the_tsc_runs_at_its_frequency(platform: Platform) -> None:
    now = 1_000_000_000
    platform.clock = lambda: now
    before = platform.rdtsc()
    now += 1_000_000
    assert platform.rdtsc() - before == platform.tsc_hz // 1000
    platform.tsc_offset = -platform.rdtsc()
    assert platform.rdtsc() == 0


@pytest.mark.parametrize(("count", "packages"), [(1, 1), (4, 2), (6, 3), (8, 2), (3, 2)])
def test_every_package_gets_processors_in_order(count: int, packages: int) -> None:
    lps = logical_processors(count, packages)
    assert [lp.index for lp in lps] == list(range(count))
    assert {lp.package for lp in lps} == set(range(packages))
    assert [lp.package for lp in lps] == sorted(lp.package for lp in lps)
    assert len({lp.x2apic_id for lp in lps}) == count


@pytest.mark.parametrize(("count", "packages"), [(1, 2), (4, 0)])
def test_packages_without_processors_are_refused(count: int, packages: int) -> None:
    with pytest.raises(ValueError, match="cannot fill"):
        logical_processors(count, packages)

"""Which local APIC a destination names: KVM's map, checked against asking each APIC for itself."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.kernel import SimKernel
from sim_backend.kvm.apic_map import ApicMap, LogicalMode
from sim_backend.kvm.lapic import DFR, ID, LDR, SPIV, LocalApic
from sim_backend.kvm.vcpu import Vcpu
from tests.unit.kvm.small_vmm import SmallVm, ordinary_host

FLAT, CLUSTER = 0xFFFF_FFFF, 0x0FFF_FFFF
APIC_ENABLE, X2APIC = 1 << 11, 1 << 10
N_VCPUS = 4


@pytest.fixture(scope="module")
def vcpus() -> Iterator[list[Vcpu]]:
    """Yield four vCPUs, whose APICs each test sets up for itself."""
    kernel = SimKernel(ordinary_host())
    with SmallVm(kernel, split=True, n_vcpus=N_VCPUS) as small:
        found = [kernel.object_of(vcpu.fd) for vcpu in small.vcpus]
        yield [vcpu for vcpu in found if isinstance(vcpu, Vcpu)]


def set_up(
    vcpu: Vcpu, *, xapic_id: int, ldr: int = 1, dfr: int = FLAT, enabled: bool = True, x2apic: bool = False
) -> LocalApic:
    apic = vcpu.apic
    assert apic is not None
    apic.base = APIC_ENABLE | X2APIC * x2apic
    apic.regs[ID], apic.regs[DFR], apic.regs[SPIV] = xapic_id << 24, dfr, 0xFF | enabled << 8
    apic.regs[LDR] = (vcpu.id >> 4) << 16 | 1 << (vcpu.id & 0xF) if x2apic else ldr << 24
    return apic


APIC = st.fixed_dictionaries(
    {
        "xapic_id": st.integers(0, 6),
        "ldr": st.sampled_from([1, 2, 4, 8, 0x11, 0x12, 0x21, 0x80, 3]),
        "dfr": st.sampled_from([FLAT, FLAT, CLUSTER]),
        "enabled": st.booleans(),
        "x2apic": st.booleans(),
    }
)


@given(
    states=st.lists(APIC, min_size=N_VCPUS, max_size=N_VCPUS), destination=st.integers(0, 0xFE), all_x2=st.booleans()
)
def test_the_map_names_whom_each_apic_would_name(
    vcpus: list[Vcpu], states: list[dict[str, Any]], destination: int, all_x2: bool
) -> None:
    apics = [
        set_up(vcpu, **{**state, "x2apic": all_x2 or bool(state["x2apic"])})
        for vcpu, state in zip(vcpus, states, strict=True)
    ]
    found = ApicMap(vcpus, ids_have_32_bits=False)
    if not found.usable:
        names = [vcpu.id if apic.x2apic else apic.xapic_id for vcpu, apic in zip(vcpus, apics, strict=True)]
        assert len(set(names)) < len(names), "it is usable unless an id is there twice"
        return

    physical = found.physical(destination)
    assert [physical] * (physical is not None) == [apic for apic in apics if apic.matches_physical(destination)]

    named = found.logical(destination)
    asked = [apic for apic in apics if apic.sw_enabled and apic.matches_logical(destination)]
    match found.logical_mode:
        case LogicalMode.MIXED:
            assert named is None
        case LogicalMode.SW_DISABLED:
            assert named == []
            assert not any(apic.sw_enabled for apic in apics)
        case _:
            assert named is not None
            assert {id(apic) for apic in named if apic is not None and apic.sw_enabled} == set(map(id, asked))


@pytest.mark.parametrize(
    ("ldrs", "dfr", "mode"),
    [
        ((1, 2), FLAT, LogicalMode.FLAT),
        ((0x11, 0x21), CLUSTER, LogicalMode.CLUSTER),
        ((1, 1), FLAT, LogicalMode.MIXED),
        ((3, 4), FLAT, LogicalMode.MIXED),
        ((0x11, 0x11), CLUSTER, LogicalMode.MIXED),
        ((0, 0), FLAT, LogicalMode.SW_DISABLED),
        ((0x10, 0x20), CLUSTER, LogicalMode.CLUSTER),
    ],
)
def test_logical_ids_must_be_one_bit_each_and_differ(
    vcpus: list[Vcpu], ldrs: tuple[int, int], dfr: int, mode: LogicalMode
) -> None:
    for vcpu, ldr in zip(vcpus[:2], ldrs, strict=True):
        set_up(vcpu, xapic_id=vcpu.id, ldr=ldr, dfr=dfr)

    assert ApicMap(vcpus[:2], ids_have_32_bits=False).logical_mode is mode


def test_two_modes_of_logical_ids_have_to_be_asked(vcpus: list[Vcpu]) -> None:
    set_up(vcpus[0], xapic_id=0, ldr=1)
    set_up(vcpus[1], xapic_id=1, ldr=0x12, dfr=CLUSTER)
    found = ApicMap(vcpus[:2], ids_have_32_bits=False)

    assert found.logical_mode is LogicalMode.MIXED
    assert found.logical(1) is None


def test_an_id_that_is_there_twice_makes_the_map_unusable_or_with_32_bit_ids_belongs_to_the_first(
    vcpus: list[Vcpu],
) -> None:
    first, _ = (set_up(vcpu, xapic_id=5) for vcpu in vcpus[:2])

    assert not ApicMap(vcpus[:2], ids_have_32_bits=False).usable
    with_32_bits = ApicMap(vcpus[:2], ids_have_32_bits=True)
    assert with_32_bits.usable
    assert with_32_bits.physical(5) is first


def test_an_empty_place_of_a_logical_destination_is_named_as_nobody(vcpus: list[Vcpu]) -> None:
    """Lowest-priority delivery counts it: with the vector that chooses it, the message is lost."""
    only = set_up(vcpus[0], xapic_id=0, ldr=2)

    assert ApicMap(vcpus[:1], ids_have_32_bits=False).logical(0b11) == [None, only]


def test_an_apic_that_is_switched_off_is_not_in_the_map(vcpus: list[Vcpu]) -> None:
    apic = set_up(vcpus[0], xapic_id=0)
    apic.base = 0

    assert ApicMap(vcpus[:1], ids_have_32_bits=False).physical(0) is None

"""The CPUID tables for INIT_VM and SET_CPUID2."""

from hypothesis import given
from hypothesis import strategies as st

from tdxhw.td_cpuid import find, mainline_init_vm, mainline_set_cpuid, v17_table
from uapi_ctypes.kvm_state import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KvmCpuidEntry2

REGISTERS = ("eax", "ebx", "ecx", "edx")
words = st.integers(0, 0xFFFF_FFFF)
entries = st.lists(
    st.builds(KvmCpuidEntry2, st.sampled_from([1, 4, 7, 0xD, 0x8000_0008]), st.integers(0, 2), st.just(1),
              words, words, words, words),
    max_size=12, unique_by=lambda entry: (entry.function, entry.index),
)  # fmt: skip


@given(entries, entries)
def test_init_vm_asks_for_no_bit_that_is_not_configurable_or_not_supported(
    configurable: list[KvmCpuidEntry2], supported: list[KvmCpuidEntry2]
) -> None:
    table = mainline_init_vm(configurable, supported, 48)

    assert [(e.function, e.index) for e in table] == [(e.function, e.index) for e in configurable]
    for entry, mask in zip(table, configurable, strict=True):
        host = find(supported, entry.function, entry.index)
        for register in REGISTERS:
            width = 0xFF_0000 if (entry.function, register) == (0x8000_0008, "eax") else 0
            value = getattr(entry, register) & ~width
            assert value & ~getattr(mask, register) == 0
            assert value & ~(getattr(host, register) if host else 0) == 0


@given(entries)
def test_every_entry_of_init_vm_names_its_sub_leaf(configurable: list[KvmCpuidEntry2]) -> None:
    table = mainline_init_vm(configurable, [], 52)

    assert all(entry.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX for entry in table)
    assert all(entry.eax >> 16 & 0xFF == 52 for entry in table if entry.function == 0x8000_0008)


@given(entries, st.sampled_from([48, 52]), st.sampled_from([3, 7, 0xE7, 3 | 1 << 11, 3 | 1 << 17 | 1 << 18]))
def test_v17_reads_gpaw_and_xfam_back_from_its_table(supported: list[KvmCpuidEntry2], gpaw: int, xfam: int) -> None:
    table = v17_table(supported, gpaw, xfam)

    for entry in table:
        if entry.function == 0x8000_0008:
            assert entry.eax & 0xFF == gpaw
    main, extended = find(table, 0xD, 0), find(table, 0xD, 1)
    if main and extended and main.index == 0 and extended.index == 1:
        xss = 1 << 8 | 1 << 11 | 1 << 12
        assert main.eax | main.edx << 32 | (extended.ecx | extended.edx << 32) & xss == xfam


@given(entries)
def test_the_input_is_not_changed(supported: list[KvmCpuidEntry2]) -> None:
    before = [bytes(entry) for entry in supported]

    v17_table(supported, 48, 3)
    mainline_set_cpuid(supported)
    mainline_init_vm(supported, supported, 48)

    assert [bytes(entry) for entry in supported] == before


@given(entries)
def test_x2apic_is_always_there(virtual: list[KvmCpuidEntry2]) -> None:
    for entry in mainline_set_cpuid(virtual):
        assert entry.function != 1 or entry.ecx & 1 << 21


def test_an_entry_without_significant_index_stands_for_every_sub_leaf() -> None:
    plain = KvmCpuidEntry2(4, 0, 0, 7)

    assert find([plain], 4, 3) is plain
    assert find([KvmCpuidEntry2(4, 0, 1, 7)], 4, 3) is None

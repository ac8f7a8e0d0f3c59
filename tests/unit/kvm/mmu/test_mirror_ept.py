from hypothesis import given
from hypothesis import strategies as st

from sim_backend.kvm.mmu.mirror_ept import MirrorEpt

GFNS = st.integers(0, (1 << 36) - 1)


def link_all(mirror: MirrorEpt, gfn: int) -> list[tuple[int, int]]:
    added: list[tuple[int, int]] = []
    for level, first in mirror.missing_tables(gfn):
        mirror.link_table(first, level, 0x1000 * (len(added) + 1))
        added.append((level, first))
    return added


def test_the_first_page_needs_a_table_at_every_level_below_the_root() -> None:
    assert [level for level, _ in link_all(MirrorEpt(4), 0x12345)] == [3, 2, 1]
    assert [level for level, _ in link_all(MirrorEpt(5), 0x12345)] == [4, 3, 2, 1]


def test_a_neighbour_needs_no_table_and_the_next_2_mib_need_one() -> None:
    mirror = MirrorEpt(4)
    link_all(mirror, 0x1000)
    assert link_all(mirror, 0x11FF) == []
    assert link_all(mirror, 0x1200) == [(1, 0x1200)]


def test_table_gfns_are_aligned_to_what_the_table_spans() -> None:
    mirror = MirrorEpt(5)
    for level, first in link_all(mirror, (1 << 36) + 0x7_6543):
        assert first % (1 << 9 * level) == 0
        assert first <= (1 << 36) + 0x7_6543 < first + (1 << 9 * level)


@given(st.sets(GFNS, max_size=40), GFNS, GFNS)
def test_a_range_yields_exactly_its_mapped_gfns_in_order(gfns: set[int], low: int, high: int) -> None:
    mirror = MirrorEpt(4)
    for gfn in gfns:
        link_all(mirror, gfn)
        mirror.map(gfn, gfn << 12)
    start, end = min(low, high), max(low, high) + 1
    assert list(mirror.mapped_gfns(start, end)) == sorted(gfn for gfn in gfns if start <= gfn < end)
    assert mirror.mapped_pages == len(gfns)
    for gfn in gfns:
        assert mirror.lookup(gfn) == gfn << 12


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=60))
def test_the_caller_may_unmap_what_it_is_given(gfns: set[int]) -> None:
    mirror = MirrorEpt(4)
    for gfn in gfns:
        link_all(mirror, gfn)
        mirror.map(gfn, 0x1000)
    for gfn in mirror.mapped_gfns(0, 1 << 40):
        mirror.unmap(gfn)
    assert mirror.mapped_pages == 0
    assert all(mirror.lookup(gfn) == -1 for gfn in gfns)


def test_dropping_the_tables_yields_each_table_once_and_the_lowest_level_first() -> None:
    mirror = MirrorEpt(4)
    pages: list[int] = []
    for gfn in (0, 0x200, 0x40000):
        for level, first in mirror.missing_tables(gfn):
            pages.append(0x1000 * (len(pages) + 1))
            mirror.link_table(first, level, pages[-1])
    dropped = list(mirror.drop_tables())
    assert sorted(dropped) == pages
    assert dropped[-1] == pages[0], "the table below the root goes last"
    assert mirror.lookup(0) == -1


def test_a_densely_mapped_page_costs_at_most_16_bytes() -> None:
    mirror = MirrorEpt(4)
    for gfn in range(4096):
        link_all(mirror, gfn)
        mirror.map(gfn, gfn << 12)
    arrays = sum(len(leaf) * leaf.itemsize for leaf in mirror._leaves.values())
    assert arrays / mirror.mapped_pages <= 16

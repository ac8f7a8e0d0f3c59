"""Memory attributes as ranges answer exactly as a set of frames would."""

from hypothesis import given
from hypothesis import strategies as st

from sim_backend.kvm.attributes import MemoryAttributes

FRAMES = 24
RANGES = st.tuples(st.integers(0, FRAMES - 1), st.integers(1, FRAMES), st.booleans())


@given(st.lists(RANGES, max_size=12), RANGES)
def test_ranges_behave_as_a_set_of_frames(changes: list[tuple[int, int, bool]], query: tuple[int, int, bool]) -> None:
    attributes, frames = MemoryAttributes(), set[int]()
    for start, length, private in changes:
        attributes.set_range(start, start + length, private)
        affected = range(start, start + length)
        frames = frames | set(affected) if private else frames - set(affected)
    assert {gfn for gfn in range(2 * FRAMES + 1) if attributes.is_private(gfn)} == frames
    start, length, private = query
    expected = all((gfn in frames) == private for gfn in range(start, start + length))
    assert attributes.range_is(start, start + length, private) == expected
    assert {gfn for low, high in attributes.private_ranges() for gfn in range(low, high)} == frames


def test_a_range_of_2_to_the_40_pages_costs_nothing() -> None:
    attributes = MemoryAttributes()
    attributes.set_range(0, 1 << 40, True)
    assert attributes.private_ranges() == [(0, 1 << 40)]
    assert attributes.is_private((1 << 40) - 1)
    assert not attributes.is_private(1 << 40)

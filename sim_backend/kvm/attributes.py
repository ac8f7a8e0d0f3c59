"""Memory attributes: which guest frames are private (``kvm->mem_attr_array``).

Kept as the sorted frame numbers at which the attribute flips, so any range costs two numbers.
"""

from bisect import bisect_left, bisect_right
from typing import Final

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3


class MemoryAttributes:
    """The PRIVATE attribute of every GFN of a VM; everything is shared at first. Changed under slots_lock."""

    __slots__ = ("_flips",)

    def __init__(self) -> None:
        self._flips: list[int] = []

    def is_private(self, gfn: int) -> bool:
        """Tell whether `gfn` has the PRIVATE attribute."""
        return bool(bisect_right(self._flips, gfn) & 1)

    def range_is(self, start: int, end: int, private: bool) -> bool:
        """Tell whether every GFN of [start, end) has the attribute as `private` says."""
        flips = self._flips
        index = bisect_right(flips, start)
        return bool(index & 1) == private and (index == len(flips) or flips[index] >= end)

    def set_range(self, start: int, end: int, private: bool) -> None:
        """Give every GFN of [start, end) the attribute, or take it away."""
        flips = self._flips
        low, high = bisect_left(flips, start), bisect_right(flips, end)
        replacement = []
        if bool(low & 1) != private:
            replacement.append(start)
        if bool(high & 1) != private:
            replacement.append(end)
        # One assignment, so a fault in another thread sees the old list or the new one.
        self._flips = [*flips[:low], *replacement, *flips[high:]]

    def private_ranges(self) -> list[tuple[int, int]]:
        """Return the private ranges [start, end) in ascending order."""
        flips = self._flips
        return [(flips[i], flips[i + 1]) for i in range(0, len(flips), 2)]

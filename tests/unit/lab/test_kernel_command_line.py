"""Which words of a kernel's command line are the kernel's: what /proc/cmdline shows behind ``--`` has no effect."""

import pytest

from tdxhw.lab.kernel_command_line import halves


@pytest.mark.parametrize(
    ("text", "for_kernel", "for_init"),
    [
        ("", [], []),
        ("ro quiet", ["ro", "quiet"], []),
        ("ro -- kvm_intel.tdx=Y", ["ro"], ["kvm_intel.tdx=Y"]),
        ("ro -- a -- b", ["ro"], ["a", "--", "b"]),
        ("ro --quiet a--b", ["ro", "--quiet", "a--b"], []),
        ('a="b -- c" ro -- d', ['a="b -- c"', "ro"], ["d"]),
        ('ro "a -- b', ["ro", '"a -- b'], []),  # as the kernel takes a quote that has no end
        ("a='b -- c'", ["a='b"], ["c'"]),  # a single quote means nothing to it
    ],
)
def test_two_hyphens_outside_of_quotes_end_the_kernel_s_own(
    text: str, for_kernel: list[str], for_init: list[str]
) -> None:
    assert halves(text) == (for_kernel, for_init)

"""The two halves of a kernel's command line: ``--`` ends the kernel's own, what follows is for init.

`parse_args()` in the kernel's ``kernel/params.c``: a word ``--`` outside of double quotes. A module parameter behind it
is none, whatever ``/proc/cmdline`` shows.
"""

import re
from typing import Final

SEPARATOR: Final = "--"
_WORD: Final = re.compile(r'(?:"[^"]*(?:"|$)|\S)+')
_GRUB_WORD: Final = re.compile(r"""(?:"(?:\\.|[^"\\])*(?:"|$)|'[^']*(?:'|$)|\\.|\S)+""")


def halves(command_line: str) -> tuple[list[str], list[str]]:
    """Return the words for the kernel and those for init, from what ``/proc/cmdline`` shows."""
    return _split(_WORD.findall(command_line))


def halves_for_grub(command_line: str) -> tuple[list[str], list[str]]:
    """Return the same from what stands in ``grub.cfg``, with the quotes that GRUB takes away."""
    return _split(_GRUB_WORD.findall(command_line))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if SEPARATOR not in words:
        return words, []
    end = words.index(SEPARATOR)
    return words[:end], words[end + 1 :]

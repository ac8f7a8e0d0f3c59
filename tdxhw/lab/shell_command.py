"""A shell command as every login shell passes it on, and its output without what the shell's start-up files print.

sshd hands a command to the user's login shell. fish and csh quote otherwise than sh does (csh runs the second line of
a quoted text as a command of its own), and start-up files print greetings where nobody reads them.
"""

import base64
from collections.abc import Callable
from typing import Final

MARK: Final = b"-- tdxhw begins here --\n"
"""Comes before the command's own output, on standard output and on standard error."""

_WORD: Final = 500  # [characters]; the longest that BSD's csh takes is 1,023
_MOST_BEFORE: Final = 1 << 20  # [bytes] of greetings that are kept


def for_any_shell(command: str) -> str:
    """Return `command`, which is for sh, as words that mean the same to bash, dash, zsh, fish, csh and tcsh."""
    mark = MARK.decode().rstrip("\n")
    marked = f"echo '{mark}'; echo '{mark}' >&2; {command}"
    encoded = base64.b64encode(marked.encode()).decode()
    words = " ".join(encoded[at : at + _WORD] for at in range(0, len(encoded), _WORD))
    return f"""exec sh -c 'eval "$(printf %s "$@" | base64 -d)"' sh {words}"""


def after_mark(output: bytes | bytearray) -> bytes | None:
    """Return what the command printed, ``None`` if it never began."""
    _, mark, rest = output.partition(MARK)
    return bytes(rest) if mark else None


class Lines:
    """Splits what arrives into lines. What comes before the mark is not the command's."""

    def __init__(self, use: Callable[[str], None] | None) -> None:
        self._use = use
        self._partial = b""
        self.begun = False
        self.before = b""

    def take(self, receive: Callable[[int], bytes], *, ready: bool) -> bool:
        """Take in what is there; tell whether there was something."""
        if not ready:
            return False
        data = receive(65536)
        use = data.replace(b"\0", b"")  # the supervisor's signs of life
        if not self.begun:
            self.before = (self.before + use)[-_MOST_BEFORE:]
            mine = after_mark(self.before)
            if mine is None:
                return bool(data)
            self.begun, arrived = True, mine
        else:
            arrived = use
        *whole, self._partial = (self._partial + arrived).split(b"\n")
        for line in whole:
            if self._use is not None:
                self._use(line.decode("utf-8", "replace"))
        return bool(data)

    def flush(self) -> None:
        """Hand over a last line that has no end."""
        if self._partial and self._use is not None:
            self._use(self._partial.decode("utf-8", "replace"))
        self._partial = b""

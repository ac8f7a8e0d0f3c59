"""Which kernel said what on one console: the own one goes down, GRUB speaks, the candidate runs, the own comes back.

What the host's own kernel complains about while it shuts down is no finding about the one on trial.
"""

import re
from collections.abc import Iterable
from typing import Final

from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.validate import grub_menu

_BANNER: Final = re.compile(r"\bLinux version (\d\S*)")
_STAMP: Final = re.compile(r"(?:<\d{1,3}>)?\[ {0,11}(\d{1,11}\.\d{1,6})\]")
_DISORDER_S: Final = 5.0  # lines of several CPUs may come in another order; a time further back is another boot's
_LAG_S: Final = 15.0  # what a serial line may be behind; a kernel that began later than that is another boot's


def said_by(lines: Iterable[ConsoleLine], release: str, own: str) -> list[ConsoleLine]:
    """Return what the kernel `release` said, after a console on which the kernel `own` spoke first.

    Who speaks is told by GRUB, which says what it boots, and by the kernel's first line. A kernel log that is read over
    SSH may have lost that: a time that begins anew is another boot, too. With ``quiet`` there may be neither; whatever
    cannot be told apart counts as said by `release`, so that nothing is lost.
    """
    parts: list[tuple[str, list[ConsoleLine]]] = [("", [])]
    last_s = began = None  # printk's time of the last line, and when by our clock this kernel began
    for line in lines:
        stamp, banner = _STAMP.match(line.text), _BANNER.search(line.text)
        now_s = float(stamp[1]) if stamp else None
        if banner:
            parts.append((banner[1] if banner[1] in (release, own) else "", []))
            last_s = began = None
        elif grub_menu.TITLE in line.text:
            parts.append((release, []))
            last_s = began = None
        elif (now_s is not None and last_s is not None and began is not None) and (
            now_s < last_s - _DISORDER_S or line.at - now_s > began + _LAG_S
        ):
            parts.append(("", []))
            began = None
        if now_s is not None:
            last_s, began = now_s, line.at - now_s if began is None else began
        parts[-1][1].append(line)
    is_told_apart = any(speaker == release for speaker, _ in parts)
    wanted = [spoken for speaker, spoken in parts[is_told_apart:] if speaker != own]
    return [line for spoken in wanted for line in spoken]

"""Bring tdxhw to a lab host: unpacked once per content, in the user's cache, without needing internet there."""

import shlex
from dataclasses import dataclass
from typing import Final

from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import Session

_KEEP_DAYS: Final = 30

# The first that is new enough; a distribution's python3 may be older than another that is installed.
_FIND_PYTHON: Final = """\
for p in python3 python3.14 python3.13 python3.12 python3.11; do
  command -v $p >/dev/null || continue
  if $p -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then command -v $p; exit 0; fi
done
found=$(python3 -V 2>&1) || found=none
echo "no Python 3.11 or newer (python3 is: $found): apt-get install python3.11, dnf install python3.11" >&2; exit 1
"""


@dataclass(frozen=True, slots=True)
class Deployed:
    """Where tdxhw is on a host."""

    python: str
    folder: str  # `PYTHON FOLDER` is the tdxhw command
    cache: str
    was_sent: bool

    @property
    def command(self) -> tuple[str, ...]:
        """The head of every command line; isolated from the user's own Python packages and locale."""
        return (self.python, "-I", "-X", "utf8", self.folder)


def deploy(session: Session, archive: Archive) -> Deployed:
    """Unpack the archive on the host unless it is there already."""
    python = session.check(_FIND_PYTHON, what="looking for Python").strip()
    cache = session.check('echo "${XDG_CACHE_HOME:-$HOME/.cache}/tdxhw"').strip()
    folder = f"{cache}/app/{archive.digest}"
    quoted = shlex.quote(folder)
    if session.run(f"test -e {quoted}/.complete && touch {quoted}").exit_code == 0:
        return Deployed(python, folder, cache, was_sent=False)
    # Unpacked beside its place and then moved: who else sends the same at the same time does no harm. It is on the disk
    # before it is in its place: a host that crashes soon after, as kernels on trial do, would keep empty files.
    unpack = (
        f"set -e; mkdir -p {shlex.quote(cache)}/app; t=$(mktemp -d {quoted}.XXXXXX); trap 'rm -rf $t' EXIT; "
        "tar -xzf - -C $t; touch $t/.complete; sync -f $t; "
        f"mv -T $t {quoted} 2>/dev/null || test -e {quoted}/.complete; "
        f"find {shlex.quote(cache)}/app {shlex.quote(cache)}/runs -mindepth 1 -maxdepth 1 -mtime +{_KEEP_DAYS} "
        "-exec rm -rf {} + 2>/dev/null || :"
    )
    session.check(unpack, stdin=archive.data, timeout_s=300, what=f"sending tdxhw to {folder}")
    return Deployed(python, folder, cache, was_sent=True)

"""Fetch the newest linux-libc-dev that the machine's own Debian mirror has, for the uapi layout tests.

The headers of the machine's release may predate KVM_TDX_*. Nothing is installed. The test reads
`.cache/uapi-headers`, or what the environment variable TDXHW_UAPI_HEADERS names.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tools import debian_archive

SUITES = ("sid", "trixie-backports", "trixie")
CACHE = Path(".cache")


def fetch(name: str, mirror: str) -> Path:
    """Download and unpack linux-libc-dev of a suite; return the include directory."""
    suite = debian_archive.Suite(mirror, name, CACHE / "debian" / "apt")
    suite.update()
    package = suite.download("linux-libc-dev", CACHE / "debian" / "packages")
    target = CACHE / "uapi-headers"
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
    (target / "provenance.txt").write_text(f"{package.name} from Debian {name}\n")
    return target / "usr" / "include"


def main() -> int:
    """Fetch from the first suite that works. Exit 2, saying why, when none does."""
    mirror = debian_archive.mirror()
    if mirror is None:
        print("no Debian mirror in /etc/apt: set TDXHW_UAPI_HEADERS to an include directory of Linux >= 6.16")
        return 2
    for suite in SUITES:
        try:
            include = fetch(suite, mirror)
        except subprocess.CalledProcessError as error:
            print(f"{suite}: {error.cmd[0]} failed with status {error.returncode}", file=sys.stderr)
            continue
        text = "".join(path.read_text() for path in include.glob("**/asm/kvm.h"))
        if "KVM_TDX_GET_CPUID" in text:
            print(f"{include}: {(include.parents[1] / 'provenance.txt').read_text().strip()}")
            return 0
        print(f"{suite}: its headers have no KVM_TDX_*", file=sys.stderr)
    print("no suite has headers with KVM_TDX_*: set TDXHW_UAPI_HEADERS to an include directory of Linux >= 6.16")
    return 2


if __name__ == "__main__":
    sys.exit(main())

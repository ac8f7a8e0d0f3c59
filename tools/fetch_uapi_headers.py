"""Fetch the newest linux-libc-dev that the machine's own Debian mirror has, for the uapi layout tests.

The headers of the machine's release may predate KVM_TDX_*. This asks apt itself, with a package list of its own in
`.cache/`: the system's sources, lists and packages stay as they are, nothing is installed, and apt checks the
signatures. The test reads `.cache/uapi-headers`, or what the environment variable TDXHW_UAPI_HEADERS names.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

SUITES = ("sid", "trixie-backports", "trixie")
CACHE = Path(".cache")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def debian_mirror() -> str | None:
    """Return the URI of the Debian archive in the machine's apt configuration."""
    for source in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for stanza in source.read_text().split("\n\n"):
            uri = re.search(r"^URIs:\s*(\S+)", stanza, re.MULTILINE)
            if uri and uri[1].rstrip("/").endswith("/debian"):
                return uri[1]
    for source in (Path("/etc/apt/sources.list"), *Path("/etc/apt").glob("sources.list.d/*.list")):
        if source.exists():
            entry = re.search(r"^deb\s+(?:\[[^\]]*\]\s+)?(\S+/debian/?)\s", source.read_text(), re.MULTILINE)
            if entry:
                return entry[1]
    return None


def fetch(suite: str, mirror: str) -> Path:
    """Download and unpack linux-libc-dev of `suite`; return the include directory."""
    work = (CACHE / "apt" / suite).resolve()
    for part in ("lists/partial", "cache/archives/partial", "download"):
        (work / part).mkdir(parents=True, exist_ok=True)
    sources = work / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    options = [
        f"-oDir::Etc::sourcelist={sources}",
        "-oDir::Etc::sourceparts=/dev/null",
        "-oDir::Etc::preferencesparts=/dev/null",
        f"-oDir::State::lists={work / 'lists'}",
        f"-oDir::Cache={work / 'cache'}",
        "-oAPT::Sandbox::User=",
        "-oAcquire::Languages=none",
        "-oAcquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
    ]
    # apt checks the keys; those of the newest suites may be younger than the machine's keyring.
    subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
    subprocess.run(
        ["apt-get", *options, "-qq", "download", f"linux-libc-dev/{suite}"], check=True, cwd=work / "download"
    )
    package = max((work / "download").glob("linux-libc-dev_*.deb"), key=lambda path: path.stat().st_mtime)
    target = CACHE / "uapi-headers"
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
    (target / "provenance.txt").write_text(f"{package.name} from Debian {suite}\n")
    shutil.rmtree(CACHE / "apt")
    return target / "usr" / "include"


def main() -> int:
    """Fetch from the first suite that works. Exit 2, saying why, when none does."""
    mirror = debian_mirror()
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

"""Download packages from the machine's own Debian mirror without installing them.

This asks apt itself, with a package list of its own: the system's sources, lists and packages stay as they are, and apt
checks the signatures. Any suite that the mirror has can be asked for, whatever the machine itself runs.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Final

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def mirror() -> str | None:
    """Return the URI of the Debian archive: TDXHW_DEBIAN_MIRROR, else that in the machine's apt configuration."""
    if os.environ.get("TDXHW_DEBIAN_MIRROR"):
        return os.environ["TDXHW_DEBIAN_MIRROR"]
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


class Suite:
    """The package lists of one suite, kept in a folder of ours."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.name = name
        work = folder.resolve() / name
        for part in ("lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True, exist_ok=True)
        sources = work / "sources.list"
        sources.write_text(f"deb [signed-by={KEYRING}] {uri} {name} main\n")
        self._options = [
            f"-oDir::Etc::sourcelist={sources}",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferencesparts=/dev/null",
            f"-oDir::State::lists={work / 'lists'}",
            f"-oDir::Cache={work / 'cache'}",
            "-oAPT::Sandbox::User=",
            "-oAcquire::Languages=none",
            "-oAcquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
        ]

    def update(self) -> None:
        """Fetch the package lists. Raise ``CalledProcessError`` when the suite cannot be had."""
        subprocess.run(["apt-get", *self._options, "-qq", "update"], check=True)

    def names(self, pattern: str) -> list[str]:
        """Return the names of the packages that match the regular expression."""
        done = subprocess.run(["apt-cache", *self._options, "pkgnames"], check=True, capture_output=True, text=True)
        return sorted(name for name in done.stdout.split() if re.fullmatch(pattern, name))

    def download(self, package: str, folder: Path) -> Path:
        """Download the newest version of `package` into `folder`; return the file, which may have been there."""
        folder.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", *self._options, "-qq", "download", f"{package}/{self.name}"]
        asked = subprocess.run([*command, "--print-uris"], check=True, capture_output=True, text=True)
        _, name, *_ = asked.stdout.split()
        if not (folder / name).exists():
            subprocess.run(command, check=True, cwd=folder)
        return folder / name

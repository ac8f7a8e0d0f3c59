"""Make one kernel: unpack the source, configure, compile, package, keep."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tools.tdx_kernel.variants import CACHE, HERE, Kernel

# What else would carry this machine's name and the time of day into the package.
_REPRODUCIBLE: Final = {
    "KBUILD_BUILD_USER": "tdxhw",
    "KBUILD_BUILD_HOST": "tdxhw",
    "KBUILD_BUILD_TIMESTAMP": "2026-01-01 00:00:00 UTC",
    "KBUILD_BUILD_VERSION": "1",
    "KDEB_CHANGELOG_DIST": "unstable",
    "KDEB_PKGVERSION": "1",
    "SOURCE_DATE_EPOCH": "1767225600",
    "DEB_BUILD_PROFILES": "pkg.linux-upstream.nokerneldbg pkg.linux-upstream.nokernelheaders",
}
_LIST: Final = "file /exits exits 0755 0 0\nfile /hangs hangs 0755 0 0\n"


class BuildError(Exception):
    """A kernel could not be built; the text says why and where the log is."""


def build(kernel: Kernel, package: Path) -> None:
    """Build `kernel` from Debian's source package and keep it in its folder. Raise ``BuildError``."""
    source = _unpacked(kernel, package)
    tree = CACHE / "build" / kernel.source / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    log = tree.parent / f"{kernel.name}.log"
    log.unlink(missing_ok=True)
    _make_init_programs(tree, log)
    _configure(kernel, source, tree, log)
    for old in tree.parent.glob("*.deb"):
        old.unlink()
    _run(["nice", "make", f"-j{os.cpu_count() or 1}", "bindeb-pkg"], tree, log)
    _keep(kernel, tree)


def _unpacked(kernel: Kernel, package: Path) -> Path:
    """Return the folder of the kernel source; unpack it if it is not there."""
    folder = CACHE / "source" / kernel.source
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as temporary:
            log = Path(temporary) / "log"
            _run(["dpkg-deb", "-x", str(package.resolve()), "package"], Path(temporary), log)
            (archive,) = Path(temporary).glob("package/usr/src/linux-source-*.tar.*")
            _run(["tar", "--extract", "--file", str(archive)], Path(temporary), log)
            (unpacked,) = Path(temporary).glob("linux-source-*")
            unpacked.rename(folder)
    return folder


def _make_init_programs(tree: Path, log: Path) -> None:
    for name, flags in (("exits", ["-DEXITS"]), ("hangs", [])):
        _run(["gcc", "-nostdlib", "-static", *flags, "-o", name, str(HERE / "init.S")], tree, log)
    (tree / "tdxhw-init.list").write_text(_LIST, encoding="utf-8")


def _configure(kernel: Kernel, source: Path, tree: Path, log: Path) -> None:
    """Write the configuration; refuse one in which a wanted line did not survive its dependencies."""
    _run(["make", "-C", str(source), f"O={tree}", "tinyconfig"], tree, log)
    with (tree / ".config").open("a", encoding="utf-8") as config:
        config.write(kernel.config)
    _run(["make", "olddefconfig"], tree, log)
    wanted = {re.split(r"[ =]", line.removeprefix("# "))[0]: line for line in _options(kernel.config)}
    got = {re.split(r"[ =]", line.removeprefix("# "))[0]: line for line in _options((tree / ".config").read_text())}
    lost = [line for name, line in wanted.items() if got.get(name, f"# {name} is not set") != line]
    if lost:
        raise BuildError(f"{kernel.name}: the kernel's Kconfig does not let these be: {', '.join(lost)}")


def _options(config: str) -> list[str]:
    return [line for line in config.splitlines() if re.match(r"(# )?CONFIG_\w+(=| is not set)", line)]


def _keep(kernel: Kernel, tree: Path) -> None:
    """Move the package into the cache; the folder appears with everything in it or not at all."""
    (deb,) = tree.parent.glob(f"linux-image-*-tdxhw-{kernel.name}_*.deb")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as temporary:
        folder = Path(temporary) / "kernel"
        folder.mkdir(mode=0o755)
        shutil.copy(deb, folder / kernel.deb.name)
        shutil.copy(tree / ".config", folder / "config")
        (folder / "source.txt").write_text(f"{kernel.source}\n", encoding="utf-8")
        if kernel.name == "good":
            (folder / "debug").mkdir()
            for path in ("vmlinux", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-intel.ko"):
                shutil.copy(tree / path, folder / "debug")
        shutil.rmtree(kernel.folder, ignore_errors=True)
        folder.rename(kernel.folder)


def _run(argv: list[str], folder: Path, log: Path) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            argv, cwd=folder, env={**os.environ, **_REPRODUCIBLE}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-8:]
        raise BuildError("\n".join((f"{' '.join(argv)} failed with status {done.returncode} ({log}):", *tail)))

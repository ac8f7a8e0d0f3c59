"""Build kernels from Debian's ``linux-source``: ``python -m tools.tdx_kernel [VARIANT…]`` (``make tdx-kernel``).

The first one takes ten minutes of two CPUs, each further one a minute or two: they are made in one tree. Each ends in
``.cache/tdx-kernel/HASH/``, where HASH stands for its configuration and the version of the source; what is there is not
made again, and needs no network. Nothing is installed but, as root, the packages that the compilation needs.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import debian_archive
from tools.tdx_kernel.build import BuildError, build
from tools.tdx_kernel.variants import CACHE, VARIANTS, Kernel, built

SUITES = ("sid", "trixie-backports")
NEEDED = {
    # command or file: Debian's package
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "rsync": "rsync",
    "cpio": "cpio",
    "depmod": "kmod",
    "pahole": "dwarves",
    "dh": "debhelper",
    "dpkg-buildpackage": "dpkg-dev",
    "xz": "xz-utils",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/elfutils/libdw.h": "libdw-dev",
    "/usr/include/openssl/ssl.h": "libssl-dev",
}


def missing_packages() -> list[str]:
    """Return the Debian packages that the compilation needs and this machine does not have."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [
        package
        for what, package in NEEDED.items()
        if not (Path(what).exists() if what.startswith("/") else shutil.which(what, path=path))
    ]


def source_package() -> Path:
    """Download Debian's newest kernel source. Raise ``BuildError`` when there is none to be had."""
    uri = debian_archive.mirror()
    if uri is None:
        raise BuildError("no Debian mirror in /etc/apt nor in TDXHW_DEBIAN_MIRROR: the kernel source comes from there")
    for name in SUITES:
        suite = debian_archive.Suite(uri, name, CACHE.parent / "debian" / "apt")
        try:
            suite.update()
            packages = suite.names(r"linux-source-\d+\.\d+")
            if packages:
                newest = max(packages, key=lambda package: [int(part) for part in package[13:].split(".")])
                return suite.download(newest, CACHE.parent / "debian" / "packages")
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.cmd[0]} failed with status {error.returncode}", file=sys.stderr)
    raise BuildError(f"no linux-source in {' or '.join(SUITES)} of {uri}")


def see_to_packages() -> None:
    """Install what is missing as root; else say what is. Raise ``BuildError`` when it is not there in the end."""
    missing = missing_packages()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing], check=False, env=environ
        )
        missing = missing_packages()
    if missing:
        raise BuildError(f"a kernel build needs: apt-get install {' '.join(missing)}")


def main() -> int:
    """Build the named kernels, all by default, and say where they are. Exit 2, saying why, when one cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tools.tdx_kernel", description=__doc__.split(":")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; all by default")
    parser.add_argument("--newest", action="store_true", help="look for a newer source, even where all are built")
    options = parser.parse_args()
    names = options.variants or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"no such kernel: {', '.join(unknown)} (there are {', '.join(VARIANTS)})")
    ready = {name: built(name) for name in names}
    if not options.newest and all(ready.values()):
        for name, kernel in ready.items():
            assert kernel is not None
            print(f"{name}: {kernel.deb}")
        return 0
    try:
        source = source_package()
        for name in names:
            kernel = Kernel(name, source.stem)
            if not kernel.is_built():
                see_to_packages()
                build(kernel, source)
            print(f"{name}: {kernel.deb}")
    except BuildError as error:
        print(f"tdx-kernel: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the payloads with GNU binutils: ``python -m tdxhw.guest.build [--check] [NAME…]``.

The build is reproducible bit by bit, and is committed, so that no run needs an assembler. ``--check``
builds in a scratch directory and compares.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tdxhw.guest.payload import PAYLOAD_DIRECTORY

_GUEST: Final = Path(__file__).parent
_SHARED_SOURCES: Final = ("boot.S", "tdx.inc", "image.ld")
_TOOLS: Final = ("as", "ld", "objcopy", "nm")


class BuildError(Exception):
    """An assembler is missing or refuses a source."""


def missing_tools() -> list[str]:
    """Return the binutils programs that this machine lacks."""
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def source_names(directory: Path = PAYLOAD_DIRECTORY) -> list[str]:
    """Return the names of all payloads that have a source."""
    return sorted(path.stem for path in directory.glob("*.S"))


def source_sha256(source: Path) -> str:
    """Return the digest of everything that goes into the payload of `source`."""
    digest = hashlib.sha256()
    for path in (*(_GUEST / name for name in _SHARED_SOURCES), source):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def build(source: Path, output: Path) -> None:
    """Assemble and link `source` to ``NAME.bin`` and ``NAME.json`` in `output`; raise `BuildError`."""
    if missing := missing_tools():
        raise BuildError(f"cannot build payloads without {', '.join(missing)}: install binutils")
    name = source.stem
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        for path in (_GUEST / "boot.S", source):
            _run("as", "--64", "-I", str(_GUEST), "-o", str(scratch / f"{path.stem}.o"), str(path))
        image = scratch / "image"
        objects = [str(scratch / f"{stem}.o") for stem in ("boot", name)]
        _run("ld", "--build-id=none", "-z", "noexecstack", "--no-warn-rwx-segments", "-T",
             str(_GUEST / "image.ld"), "-o", str(image), *objects)  # fmt: skip
        _run("objcopy", "-O", "binary", "-j", ".image", str(image), str(scratch / "image.bin"))
        data = (scratch / "image.bin").read_bytes()
        symbols = {}
        for line in _run("nm", str(image)).splitlines():
            address, kind, symbol = line.split()
            if kind not in "aA":  # constants are not addresses
                symbols[symbol] = f"{int(address, 16):#x}"
    description = {
        "image_bytes": len(data),
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "source_sha256": source_sha256(source),
        "symbols": dict(sorted(symbols.items())),
    }
    (output / f"{name}.bin").write_bytes(data)
    (output / f"{name}.json").write_text(json.dumps(description, indent=1) + "\n", "ascii")


def differences(name: str, directory: Path = PAYLOAD_DIRECTORY) -> list[str]:
    """Rebuild payload `name` and return which committed files differ from the result."""
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        build(directory / f"{name}.S", scratch)
        return [
            file.name
            for file in sorted(scratch.iterdir())
            if not (directory / file.name).is_file() or (directory / file.name).read_bytes() != file.read_bytes()
        ]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "Info: macro invoked" not in line]
        raise BuildError("\n".join([f"{command[0]} failed:", *lines[:20]]))
    return result.stdout


def main(arguments: list[str] | None = None) -> int:
    """Build or check; return the exit code: 0 good, 1 a committed build differs, 2 it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tdxhw.guest.build", description="Build the guest payloads.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="payloads to build (all)")
    parser.add_argument("--check", action="store_true", help="compare with the committed builds")
    options = parser.parse_args(arguments)
    status = 0
    try:
        for name in options.names or source_names():
            if options.check:
                for file in differences(name):
                    sys.stderr.write(f"{file} is not what its sources build\n")
                    status = 1
            else:
                build(PAYLOAD_DIRECTORY / f"{name}.S", PAYLOAD_DIRECTORY)
    except (BuildError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())

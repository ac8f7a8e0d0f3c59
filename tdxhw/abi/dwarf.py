"""Structures from DWARF, where a kernel has no BTF: pahole makes BTF of it, the kernel's own way to get there."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tdxhw.abi import btf
from tdxhw.abi.errors import AbiError

_TIME_LIMIT_S: Final = 600


def read(file: Path) -> btf.Types:
    """Read the DWARF of an ELF file. Raise `AbiError` when pahole is missing or finds nothing."""
    program = shutil.which("pahole")
    if program is None:
        raise AbiError(f"{file.name}: reading DWARF needs pahole: install your distribution's package dwarves")
    with tempfile.TemporaryDirectory(prefix="tdxhw-abi-") as folder:
        encoded = Path(folder) / file.name
        argv = [program, "-F", "dwarf", "--btf_encode_detached", str(encoded), "-J", str(file)]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise AbiError(f"{file.name}: pahole did not end within {_TIME_LIMIT_S} s") from None
        if done.returncode != 0 or not encoded.exists():
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise AbiError(f"{file.name}: pahole cannot read its DWARF: {said[-1]}")
        return btf.read(encoded)

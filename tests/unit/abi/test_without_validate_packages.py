"""``tdxhw abi`` where the extra `validate` was not installed: one line that says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.abi.samples import bzimage, classic_package, deb, vmlinux

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("elftools", "debian", "backports"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from tdxhw.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("linux-image.deb", deb(classic_package())),
        ("vmlinux", vmlinux()),
        pytest.param(
            "vmlinuz",
            bzimage(vmlinux(), "zst"),
            marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python itself reads zstd from 3.14 on"),
        ),
    ],
)
def test_it_says_what_to_install(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    command = [sys.executable, "-c", BLOCK, "abi", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tdxhw: ")
    assert done.stderr.endswith("pip install 'tdxhw[validate]'\n")
    assert done.stderr.count("\n") == 1

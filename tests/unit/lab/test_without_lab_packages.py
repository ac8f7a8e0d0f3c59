"""What works where tdxhw was sent to a host, or installed without its lab packages, and what says what to install."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("yaml", "fabric", "paramiko", "jinja2", "kcidb_io", "unicorn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from tdxhw.cli import main
sys.exit(main(sys.argv[1:]))
"""


def tdxhw(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BLOCK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_doctor_needs_nothing_but_the_core() -> None:
    done = tdxhw("doctor")
    assert done.returncode in (0, 1, 2)
    assert "this host: " in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("lab", "list"),
        ("lab", "status"),
        ("run", "--on", "lab:spr-01"),
        ("doctor", "--on", "lab:spr-01"),
        ("lab", "trust", "a"),
    ],
)
def test_lab_commands_say_what_to_install(arguments: tuple[str, ...]) -> None:
    done = tdxhw(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("tdxhw: ")
    assert done.stderr.endswith("pip install 'tdxhw[lab]'\n")
    assert done.stderr.count("\n") == 1

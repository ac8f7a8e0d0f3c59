"""A git repository that stands for a kernel's: each commit's file `state` says how a validation of it ends."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxhw.bisect import plan as plans
from tdxhw.bisect.plan import Plan

# What validates: it reads the "kernel" and ends as that says.
VALIDATOR: Final = """
import pathlib, signal, sys, time
kernel = pathlib.Path(sys.argv[sys.argv.index("--kernel") + 1])
state = kernel.read_text().strip()
print(f"validating {kernel.name}", flush=True)
if state == "hangs":
    def interrupted(number, frame):
        time.sleep(0.3)
        pathlib.Path("rolled-back").write_text(str(number))
        print("rolled back", flush=True)
        sys.exit(130)
    signal.signal(signal.SIGINT, interrupted)
    pathlib.Path("hanging").write_text("")
    time.sleep(60)
codes = {"good": (0, "GOOD: 3 tests pass as before"), "bad": (1, "REGRESSED: 1 test fails that passed: a::b"),
         "lost": (125, "INCONCLUSIVE: infrastructure: spr-01: no power"), "odd": (2, "tdxhw: usage")}
code, line = codes[state]
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "outcome.json").write_text("{}")
print(line)
sys.exit(code)
"""
BUILD: Final = (
    'test "$(cat state)" != broken && mkdir -p ../out && cp state ../out/linux-image-$(git rev-parse HEAD).deb'
)


@dataclass(frozen=True, slots=True)
class KernelTree:
    """The repository, its commits in order, and the folder around it."""

    around: Path
    commits: tuple[str, ...]

    @property
    def tree(self) -> Path:
        return self.around / "linux"

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(self.tree), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def plan(self, build: str = BUILD, kernel: str = "../out/linux-image-*.deb", give_up_after: int = 3) -> Plan:
        validator = self.around / "validator.py"
        validator.write_text(VALIDATOR)
        return plans.make(
            self.tree, self.commits[0], self.commits[-1], build=build, kernel=kernel,
            validate=(sys.executable, str(validator)), cwd=self.around,
            keep=self.around / "keep", give_up_after=give_up_after,
        )  # fmt: skip


def make_tree(around: Path, states: Sequence[str]) -> KernelTree:
    """Make a repository with one commit per state, on the branch `next`."""
    tree = KernelTree(around, ())
    tree.tree.mkdir()
    tree.git("init", "--quiet", "--initial-branch=next")
    commits = []
    for number, state in enumerate(states):
        (tree.tree / "state").write_text(state)
        (tree.tree / "number").write_text(str(number))
        tree.git("add", ".")
        tree.git("commit", "--quiet", "--message", f"kvm/tdx: change {number}")
        commits.append(tree.git("rev-parse", "HEAD"))
    return KernelTree(around, tuple(commits))

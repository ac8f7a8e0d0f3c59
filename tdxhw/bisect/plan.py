"""What to bisect, checked before anything is built: a mistake found after the first build has cost an hour."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tdxhw.bisect.errors import BisectError

DEFAULT_KERNEL: Final = "../linux-image-*.deb"
"""Where `make bindeb-pkg` puts the package, seen from the tree."""

_PLAIN: Final = re.compile(r"[\w./+-]+")


@dataclass(frozen=True, slots=True)
class Plan:
    """A bisection that can begin."""

    tree: str  # the kernel's git tree
    good: str  # commit
    bad: str  # commit
    build: str  # a shell command, run in the tree
    kernel: str  # what it makes: a path or a pattern, seen from the tree
    validate: tuple[str, ...]  # a command; `--kernel FILE --out DIR` are added
    cwd: str  # where that command is at home
    keep: str  # a folder for logs
    give_up_after: int  # validations in a row that came to no verdict; builds, if none ever succeeded
    owner: int = 0  # the process that watches over the bisection

    @property
    def file(self) -> Path:
        """Where the plan is for the steps to read."""
        return Path(self.keep) / "plan.json"

    def save(self) -> None:
        """Write it, into a new folder. ``BisectError`` if it cannot be written."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise BisectError(f"{self.file}: cannot write it: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "validate": tuple(fields["validate"])})


def git(tree: Path | str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run git in the tree. ``BisectError`` if there is no git."""
    try:
        command = ["git", "-C", str(tree), *arguments]
        # A group of its own: Ctrl-C is for us, git has a tree to put back.
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            process_group=0, env=dict(os.environ, LC_ALL="C.UTF-8"),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BisectError("git is not installed") from error


def make(
    tree: Path,
    good: str,
    bad: str,
    *,
    build: str,
    kernel: str,
    validate: Sequence[str],
    cwd: Path,
    keep: Path,
    give_up_after: int,
) -> Plan:
    """Return the plan. ``BisectError`` says what stands against it; nothing was touched then."""
    # 1. The tree is a git tree, and nobody bisects in it.
    top = git(tree, "rev-parse", "--show-toplevel")
    if "dubious ownership" in top.stderr:
        raise BisectError(f"{tree}: belongs to another user: git config --global --add safe.directory {tree.resolve()}")
    if top.returncode != 0 or not top.stdout.strip():
        raise BisectError(f"{tree}: not a git tree: --tree names the kernel's")
    tree = Path(top.stdout.rstrip("\n"))
    if git(tree, "bisect", "log").returncode == 0:
        raise BisectError(
            f"{tree}: a bisection is under way there: `git bisect log` shows it, `git bisect reset` ends it"
        )

    # 2. Nothing in it would be lost or be built into every kernel.
    changed = git(tree, "status", "--porcelain", "--untracked-files=no")
    if changed.returncode != 0:
        raise BisectError(f"{tree}: {_last_line(changed.stderr)}")
    if changed.stdout:
        names = [line[3:] for line in changed.stdout.splitlines()]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise BisectError(f"{tree}: {names[0]}{more} changed: commit or stash that first")

    # 3. There is something between the two ends, in this direction.
    first, last = _commit(tree, "--good", good), _commit(tree, "--bad", bad)
    if first == last:
        raise BisectError(f"--good {good} and --bad {bad} are the same commit")
    if git(tree, "merge-base", "--is-ancestor", last, first).returncode == 0:
        raise BisectError(f"--bad {bad} comes before --good {good}: a fix, not a regression? Exchange the two")
    if git(tree, "merge-base", first, last).returncode != 0:
        is_shallow = git(tree, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        why = ": the clone is shallow: git fetch --unshallow" if is_shallow else ""
        raise BisectError(f"--good {good} and --bad {bad} have no history in common{why}")

    # 4. The build command is there.
    _check_build(tree, build)

    # 5. The logs have a place of their own.
    try:
        if keep.exists() and any(keep.iterdir()):
            raise BisectError(f"{keep}: not empty: --keep names a folder for this bisection's logs")
    except OSError as error:
        raise BisectError(f"{keep}: {error.strerror}") from error
    return Plan(str(tree), first, last, build, kernel, tuple(validate), str(cwd), str(keep.resolve()), give_up_after)


def _commit(tree: Path, option: str, revision: str) -> str:
    found = git(tree, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    if found.returncode != 0:
        raise BisectError(f"{option} {revision}: no such commit in {tree}")
    return found.stdout.strip()


def _check_build(tree: Path, build: str) -> None:
    """See that the shell understands the command, and that its first program is there, if that can be told."""
    syntax = subprocess.run(["sh", "-n", "-c", build], capture_output=True, text=True, errors="replace", check=False)
    if syntax.returncode != 0:
        raise BisectError(f"--build: not a shell command: {_last_line(syntax.stderr)}")
    words = shlex.shlex(build, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, ""
    try:
        program = next((word for word in words if "=" not in word), "")
    except ValueError:  # quotes that only the shell understands
        return
    if not program:
        raise BisectError("--build: names no command")
    if not _PLAIN.fullmatch(program):
        return  # "$HOME/build", "(": that is for the shell
    find = ["sh", "-c", 'command -v -- "$1"', "sh", program]
    if subprocess.run(find, cwd=tree, capture_output=True, check=False).returncode:
        raise BisectError(f"--build: no command {program!r} in {tree}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["git failed"])[-1]

"""One bisection from `git bisect start` to `git bisect reset`, which comes whatever happens in between."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Final

from tdxhw.bisect.errors import BisectError
from tdxhw.bisect.plan import Plan, git
from tdxhw.bisect.step import Step, never_built, steps

_FIRST_BAD: Final = re.compile(r"^# first bad commit: \[([0-9a-f]+)\] (.*)$", re.MULTILINE)
_POSSIBLE: Final = re.compile(r"^# possible first bad commit: \[([0-9a-f]+)\] (.*)$", re.MULTILINE)
_MERGE_BASE: Final = re.compile(r"^The merge base ([0-9a-f]+) is bad", re.MULTILINE)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a bisection."""

    commits: tuple[
        tuple[str, str], ...
    ]  # (commit, subject) of the first bad one; several if those between had no verdict
    steps: tuple[Step, ...]
    interrupted: bool
    log: Path  # `git bisect replay` reads it
    problem: str = ""  # why it ended early
    not_reset: str = ""  # why the tree is not as it was


def bisect(plan: Plan, say: Callable[[str], None] = lambda _line: None) -> Found:
    """Bisect. The tree is as it was afterwards, also after Ctrl-C; `Found.not_reset` says if it could not be done."""
    plan = replace(plan, owner=os.getpid())
    keep = Path(plan.keep)
    plan.save()
    watch = _Watch(keep, say)
    with watch:
        try:
            started = git(plan.tree, "bisect", "start", plan.bad, plan.good)
            if started.returncode == 0:
                say(started.stdout.strip())
                if not _FIRST_BAD.search(git(plan.tree, "bisect", "log").stdout):  # else one is the other's parent
                    _run(plan, watch, say)
            problem = "" if started.returncode == 0 else f"git bisect start: {git_says(started.stderr)}"
        finally:
            log = keep / "git-bisect.log"
            told = git(plan.tree, "bisect", "log").stdout
            log.write_text(told, encoding="utf-8")
            reset = git(plan.tree, "bisect", "reset")
    if problem:
        raise BisectError(f"{plan.tree}: {problem}")
    commits = tuple(dict.fromkeys(_FIRST_BAD.findall(told) or _POSSIBLE.findall(told)))
    tried = tuple(steps(keep))
    return Found(
        commits,
        tried,
        watch.interrupted,
        log,
        problem="" if commits else _why(tried, plan),
        not_reset="" if reset.returncode == 0 else git_says(reset.stderr),
    )


def _run(plan: Plan, watch: "_Watch", say: Callable[[str], None]) -> None:
    # -P: the kernel's tree, where this runs, is no place to import from.
    step = [sys.executable, "-P", "-m", "tdxhw.bisect.step", str(plan.file)]
    if watch.interrupted:
        return
    # A group of its own: Ctrl-C is for us, and we pass it on to the step, which has things to put back.
    command = ["git", "-C", plan.tree, "bisect", "run", *step]
    with _git_errors(plan).open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, process_group=0,
            text=True, errors="replace",
        )  # fmt: skip
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith("running "):  # git's words for our own command
                    say(line.rstrip("\n"))


def _git_errors(plan: Plan) -> Path:
    return Path(plan.keep) / "git-errors.log"


def _why(tried: tuple[Step, ...], plan: Plan) -> str:
    last = tried[-1] if tried else None
    if last is not None and never_built(tried, plan.give_up_after):
        return f"the build failed {len(tried)} times and never succeeded; the last: {last.line}"
    if last is None or last.outcome in ("good", "bad", "build failed"):  # git could have gone on
        told = _git_errors(plan).read_text(encoding="utf-8") if _git_errors(plan).exists() else ""
        if (base := _MERGE_BASE.search(told)) is not None:
            return (
                f"{base[1]}, where --good and --bad branched off, is bad, too: what is wrong was fixed on the way to "
                f"--good {plan.good[:12]}, so no commit on the way to --bad {plan.bad[:12]} brought it in"
            )
        return f"git bisect run: {git_says(told)}"
    if last.outcome == "inconclusive":
        times = f"{plan.give_up_after} times in a row" if plan.give_up_after > 1 else "once"
        return f"no verdict {times}; the last: {last.line}"
    return last.line


def git_says(errors: str) -> str:
    """Return the first complaint in one line, with the files that it lists."""
    lines = iter(errors.splitlines())
    for line in lines:
        if line.startswith(("error: ", "fatal: ")):
            names = [name.strip() for name in takewhile(lambda name: name.startswith("\t"), lines)]
            return " ".join([line.partition(": ")[2], *names])
    return (errors.strip().splitlines() or ["git failed and did not say why"])[-1]


class _Watch:
    """Passes signals on to the step that is running, and keeps a further one from beginning."""

    def __init__(self, keep: Path, say: Callable[[str], None]) -> None:
        self._keep, self._say = keep, say
        self.interrupted = False

    def __enter__(self) -> None:
        """Take the signals over, but for one that our parent made us ignore."""
        self._before = {
            number: signal.signal(number, self._signalled)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }

    def __exit__(self, *_error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if not self.interrupted:
            with suppress(RuntimeError):  # the signal came in the middle of printing another line
                self._say("interrupted: waiting for the step that is running to put things back")
        self.interrupted = True
        (self._keep / "stop").touch()  # before we look for a step: either it sees this, or we see it
        with suppress(OSError, ValueError):
            os.kill(int((self._keep / "pid").read_text(encoding="utf-8")), signal.SIGINT)

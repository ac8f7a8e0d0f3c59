"""What `git bisect run` runs at each commit: build, find the kernel that was built, validate it.

``python -m tdxhw.bisect.step PLAN``. The exit code is git's language: 0 good, 1 bad, 125 cannot say, 128 and more:
stop the bisection. A build that fails is 125: that commit broke the build, not the kernel.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Final

from tdxhw.bisect.plan import Plan, git

GOOD: Final = 0
BAD: Final = 1
SKIP: Final = 125
INTERRUPTED: Final = 130
STOP: Final = 255

_BUILD_ENDS_S: Final = 10
"""How long an interrupted build may take to end [s]."""

_LOOK_S: Final = 0.25
"""How often new output is looked for [s]."""

# What an exit code of `tdxhw validate` means to git; any other stops the bisection: it would guess.
OUTCOMES: Final = {GOOD: "good", BAD: "bad", SKIP: "inconclusive", INTERRUPTED: "interrupted"}


@dataclass(frozen=True, slots=True)
class Step:
    """One commit that was tried."""

    commit: str
    subject: str
    outcome: str  # "good", "bad", "inconclusive", "build failed", "interrupted", "stopped"
    line: str  # the last thing that build or validation said
    build_s: float  # [s]
    validate_s: float  # [s]


def steps(keep: Path) -> list[Step]:
    """Return the steps so far."""
    path = keep / "steps.jsonl"
    if not path.exists():
        return []
    return [Step(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


class _Interrupted(Exception):  # noqa: N818
    """The bisection is to end."""


class Runner:
    """Runs one command after the other, each in a process group of its own that a signal to us is passed on to."""

    def __init__(self, keep: Path) -> None:
        self._stop_file = keep / "stop"
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = self._is_build = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGALRM, lambda _number, _frame: self._tell_child(signal.SIGKILL))
        (keep / "pid").write_text(str(os.getpid()), encoding="utf-8")  # before we look whether to stop

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True
        self._interrupt_child()

    def _interrupt_child(self) -> None:
        """End a build soon; give a validation all the time it wants, because it has a host to put back."""
        if self._is_build:
            self._tell_child(signal.SIGTERM)  # make removes what is half made
            signal.alarm(_BUILD_ENDS_S)
        else:
            self._tell_child(signal.SIGINT)

    def _tell_child(self, number: int) -> None:
        if self._child is not None and self._child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def check(self) -> None:
        """End here if the bisection is to end."""
        if self._stopped or self._stop_file.exists():
            raise _Interrupted

    def run(self, command: Sequence[str], cwd: str, log: Path, *, is_build: bool) -> tuple[int, str, float]:
        """Return exit code, last line and time [s]."""
        self._child, self._is_build = None, is_build
        self.check()
        begun = time.monotonic()
        with log.open("wb") as file, log.open(encoding="utf-8", errors="replace") as said:
            self._child = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )
            if self._stopped:  # between the check and now
                self._interrupt_child()
            last = _follow(self._child, said, show=not is_build)
            signal.alarm(0)
        self.check()
        return self._child.returncode, last, time.monotonic() - begun


def _follow(child: "subprocess.Popen[bytes]", said: IO[str], *, show: bool) -> str:
    """Wait until a command has ended; return its last line that is not empty.

    Its output may have no end then: what it left in the background (a compiler's server) still has it open.
    """
    last, line, has_ended = "", "", False
    while not has_ended:
        try:
            child.wait(_LOOK_S)
            has_ended = True  # what it said until now is all that counts, and is looked at once more
        except subprocess.TimeoutExpired:
            pass
        while part := said.readline():
            line += part
            if line.endswith("\n") or has_ended:
                if show:
                    _write(line)
                last, line = line.strip() or last, ""
    return line.strip() or last


def built(tree: Path, pattern: str) -> dict[Path, tuple[int, int, int]]:
    """Return the files that the pattern means, and what tells a file from the one that was there before."""
    found = {}
    for path in tree.glob(pattern) if not pattern.startswith("/") else Path("/").glob(pattern[1:]):
        if "-dbg_" not in path.name and path.is_file():
            state = path.stat()
            found[path] = (state.st_ino, state.st_mtime_ns, state.st_size)
    return found


def _kernel(plan: Plan, before: dict[Path, tuple[int, int, int]]) -> tuple[Path | None, str]:
    """Return the kernel that was built, or why there is none to take."""
    now = built(Path(plan.tree), plan.kernel)
    new = sorted(path for path, state in now.items() if before.get(path) != state)
    if not new and len(now) == 1 and not any(letter in plan.kernel for letter in "*?["):
        return next(iter(now)), ""  # make found it up to date
    if len(new) == 1:
        return new[0], ""
    found = f"several files, {', '.join(path.name for path in new)}," if new else "no file"
    return None, f"the build succeeded and made {found} that --kernel {plan.kernel} means"


def run_step(plan: Plan) -> Step:
    """Try the commit that is checked out."""
    keep = Path(plan.keep)
    commit, _, subject = git(plan.tree, "log", "-1", "--format=%H %s").stdout.strip().partition(" ")
    name = f"{len(steps(keep)) + 1:03}-{commit[:12]}"
    build_s = validate_s = 0.0

    def ended(outcome: str, line: str) -> Step:
        return Step(commit, subject, outcome, line, round(build_s, 1), round(validate_s, 1))

    try:
        if plan.owner and not _is_alive(plan.owner):
            return ended("stopped", "the tdxhw that watched over the bisection is gone")
        runner = Runner(keep)
        runner.check()
        before = built(Path(plan.tree), plan.kernel)
        _say(f"{commit[:12]} {subject}: building")
        log = keep / f"{name}.build.log"
        code, line, build_s = runner.run(["sh", "-c", plan.build], plan.tree, log, is_build=True)
        if code != 0:
            _say(f"{commit[:12]}: the build failed ({line}); skipped; its output: {log}")
            return ended("build failed", line)
        kernel, why = _kernel(plan, before)
        if kernel is None:
            return ended("stopped", why)
        _say(f"{commit[:12]}: built {kernel.name} in {build_s:.0f} s; validating")
        command = [*plan.validate, "--kernel", str(kernel), "--out", str(keep / name)]
        code, line, validate_s = runner.run(command, plan.cwd, keep / f"{name}.validate.log", is_build=False)
    except _Interrupted:
        return ended("interrupted", "interrupted")
    if code not in OUTCOMES:
        return ended("stopped", f"the validation ended with {code}: {line}")
    if code in (GOOD, BAD) and not (keep / name / "outcome.json").exists():
        # 1 is also how a program ends that has a mistake in it; no commit is to blame for that.
        return ended("stopped", f"the validation ended with {code} and left no verdict: {line}")
    return ended(OUTCOMES[code], line)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def never_built(tried: Sequence[Step], give_up_after: int) -> bool:
    """Say whether the build command is to blame: it failed so often, and never succeeded."""
    return len(tried) >= give_up_after and all(step.outcome == "build failed" for step in tried)


def exit_code(plan: Plan, now: Step) -> int:
    """Return what to tell git. A build that never succeeds, or a lab that never gives a verdict, is the end."""
    # fmt: off
    code = {"good": GOOD, "bad": BAD, "inconclusive": SKIP, "build failed": SKIP, "interrupted": INTERRUPTED,
            "stopped": STOP}[now.outcome]
    # fmt: on
    tried = steps(Path(plan.keep))
    if never_built(tried, plan.give_up_after):
        _say("giving up: no build has succeeded")
        return STOP
    validated = [step.outcome for step in tried if step.outcome != "build failed"]
    latest = validated[-plan.give_up_after :]
    if now.outcome == "inconclusive" and len(latest) == plan.give_up_after and set(latest) == {"inconclusive"}:
        _say("giving up: another build would not make the lab any better")
        return STOP
    return code


def _say(text: str) -> None:
    _write(f"tdxhw: {text}\n")


def _write(text: str) -> None:
    """Show it. Nobody there to read it is no reason to leave a validation alone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str]) -> int:
    """Run one step, record it, and return git's exit code."""
    plan = Plan.load(Path(arguments[0]))
    now = run_step(plan)
    with (Path(plan.keep) / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(now)) + "\n")
    return exit_code(plan, now)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Validate one kernel on one host: the way there, the trials, and the way back, which is taken whatever happens."""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tdxhw.errors import HarnessError
from tdxhw.lab import kernel_marks
from tdxhw.lab.console import Capture
from tdxhw.lab.console.findings import scan, tie
from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.lab.errors import LabUnreachable, LeaseLost, RemoteFailed
from tdxhw.lab.lease import who_am_i
from tdxhw.report.results import Results
from tdxhw.validate import matrix
from tdxhw.validate.boot_once import BootFailure, Trial
from tdxhw.validate.candidate import Candidate
from tdxhw.validate.course import Course
from tdxhw.validate.errors import Refused, Stranded
from tdxhw.validate.machine import Boot, Machine
from tdxhw.validate.outcome import Outcome, Tried
from tdxhw.validate.preparation import prepare
from tdxhw.validate.recovery import hold, recover_leftovers, way_back
from tdxhw.validate.signals import Signals
from tdxhw.validate.speakers import said_by
from tdxhw.validate.states import State
from tdxhw.validate.suites import host_clock_ahead_s
from tdxhw.validate.surroundings import Surroundings
from tdxhw.validate.target import check
from tdxhw.validate.way_back import WayBack

TOKEN: Final = "tdxhw.validate="  # noqa: S105  (on a command line, for everybody to see)
_GUARD_PART: Final = 0.5  # of the boot limit
_REBOOTS: Final = 5  # under one kernel: more, and the host is out of order
_CONSOLE_S: Final = 20.0
_LAG_S: Final = 15.0  # what a console may be behind; one that leaves out warnings (quiet) is waited for so long
_LOOK_S: Final = 0.2
_RECENT: Final = 1000  # lines


@dataclass(frozen=True, slots=True)
class Plan:
    """What to validate, where, and how."""

    host: str
    candidate: Candidate
    base: Results
    matrix: Sequence[dict[str, str]]
    out: Path
    token: str
    boot_limit_s: float = 300.0
    retries: int = 1  # of a boot that failed without a proof, at most 1
    panic_s: int = 10
    command_line: str = ""
    narrowed: bool = False  # not every test of `base` is to be run


class Validation:
    """One validation. `run` may be called once."""

    def __init__(self, plan: Plan, surroundings: Surroundings, say: Callable[[str], None]) -> None:
        self.plan = plan
        candidate = plan.candidate
        self.outcome = Outcome(
            plan.host, candidate.release, plan.base, plan.narrowed, 1 + plan.retries, candidate.build_id
        )
        self._around = surroundings
        self._say = say
        self._token = TOKEN + plan.token
        self._course = Course(plan.host, plan.out, say)
        self._machine = Machine(plan.host, surroundings.connect, clock=surroundings.clock)
        self._capture: Capture | None = None
        self._way_back: WayBack | None = None
        self._reboots = 0

    def run(self) -> Outcome:
        """Do everything. Never raises: what went wrong is in the outcome."""
        started = time.monotonic()
        signals = Signals(self._say)
        try:
            with signals, ExitStack() as stack:
                stack.callback(self._machine.drop)
                hold(self._around, self._machine, "tdxhw validate", self._say, stack)
                self._open_the_console(stack)
                self._there_and_back(signals)
        except KeyboardInterrupt:
            self.outcome.interrupted = True
            self._tell_what_is_left()
        except HarnessError as error:
            self.outcome.problems.append(str(error))
            self._tell_what_is_left()
        except Exception as error:  # noqa: BLE001  (a traceback would end with exit code 1, which is a verdict)
            self._internal_error(error)
            self._tell_what_is_left()
        self.outcome.state = self._course.state
        self.outcome.duration_s = time.monotonic() - started
        return self.outcome

    def _there_and_back(self, signals: Signals) -> None:
        before: dict[str, Any] = {}
        try:
            recover_leftovers(
                self._machine, self._course, self._around.power, self.plan.boot_limit_s, self.outcome.problems
            )
            before = self._machine.survey()
            self._go(before)
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        except (Stranded, LeaseLost):
            raise  # there is no way back: nobody can take it, or it is not ours to take
        except HarnessError as error:
            self.outcome.problems.append(str(error))
        except Exception as error:  # noqa: BLE001  (a mistake of ours is no reason to leave the host as it is)
            self._internal_error(error)
        signals.shield("rolling back", insisted=self.outcome.interrupted)
        if self._way_back is not None:
            failed, self.outcome.differences = self._way_back.restore(before)
            self.outcome.problems += [f"rolling back: {one}" for one in failed]
            self.outcome.problems += [str(one) for one in self.outcome.differences if one.is_ours]

    def _internal_error(self, error: Exception) -> None:
        self._course.keep("internal-error.txt", traceback.format_exc().splitlines())
        self.outcome.problems.append(f"internal error: {type(error).__name__}: {error}: please report this")

    # ---- the way there ----

    def _go(self, before: dict[str, Any]) -> None:
        plan, machine = self.plan, self._machine
        target = check(plan.host, before, plan.candidate, plan.boot_limit_s)
        base = Boot.of(before)
        self._see_the_power()
        self._course.note(f"runs {base}; everything that was checked is fit for {plan.candidate.release}")
        dmesg = machine.link.run("dmesg").stdout.splitlines()
        self.outcome.base_findings = scan(ConsoleLine(0.0, line) for line in dmesg)
        head = {
            "token": self._token, "owner": who_am_i(), "release": plan.candidate.release,
            "build_id": plan.candidate.build_id, "before": before,
        }  # fmt: skip
        self._way_back = way_back(machine, self._course, head, plan.boot_limit_s, self._around.power)
        machine.begin(head)
        guard_s = max(30, int(plan.boot_limit_s * _GUARD_PART))
        kernel, initrd = prepare(machine, self._course, target, plan.candidate, guard_s)
        trial = Trial(
            machine, self._course, self._way_back, target, plan.candidate, self._token, kernel, initrd,
            plan.boot_limit_s, plan.panic_s, plan.command_line, self._said,
        )  # fmt: skip
        for number, parameters in enumerate(plan.matrix):
            tried = Tried(parameters, other_parameters=matrix.differs(parameters, before.get("parameters", {})))
            self._try(trial, tried, f"results-{number}" if len(plan.matrix) > 1 else "results")

    def _see_the_power(self) -> None:
        """Find out now whether power control works, not when it is needed. ``HarnessError`` if it does not."""
        power = self._around.power()
        if power is None:
            self._course.note("has no power control: if the candidate hangs, somebody may have to reset it by hand")
        elif not power.is_on():
            raise Refused(
                f"{self.plan.host}: {power.name} says that it is off, and it answers: is that its own switch?"
            )

    def _try(self, trial: Trial, tried: Tried, name: str) -> None:
        parameters = tried.parameters
        self.outcome.tried.append(tried)
        said_before = len(self._said())
        ahead_s, is_ours = 0.0, True
        self._reboots = 0
        try:
            failure = self._boot(trial, parameters)
            tried.boot_failure = failure.text if failure is not None else ""
            if failure is None:
                used = self._machine.hkids_used()
                ahead_s = host_clock_ahead_s(self._machine.link.run("date +%s.%N").stdout)
                try:
                    tried.problems += self._around.run_suites(
                        self.plan.base, name, tried.results, lambda: self._up_again(trial, parameters),
                        trial.way_back.press_if_lost,
                    )  # fmt: skip
                    tried.not_as_asked += trial.not_as_asked(parameters)
                    tried.left_behind += trial.left_behind(used)
                    self._hear_it_out()
                finally:
                    self._see_which_kernel(tried)
        except LeaseLost:
            is_ours = False  # since when is not known: what its console said may be the other's doing
            raise
        finally:
            results = [result for part in tried.results for result in part.results]
            said = said_by(self._said()[said_before:], self.plan.candidate.release, str(trial.target.survey["release"]))
            tried.findings = tie(scan(said), results, host_ahead_s=ahead_s) if is_ours else []
            if self._capture is not None and self._capture.problem:
                self._course.note(f"{self._capture.problem}: what it said since then is not known")

    def _boot(self, trial: Trial, parameters: dict[str, str]) -> BootFailure | None:
        """Boot the candidate; once more if it failed and nothing proves that it was its own fault."""
        failure = trial.boot(parameters)
        if failure is not None and not failure.is_proven and self.plan.retries:
            self._course.note(f"{failure.text}; once more")
            failure = trial.boot(parameters)
        return failure

    def _up_again(self, trial: Trial, parameters: dict[str, str]) -> None:
        """Boot the kernel on trial once more: after a reboot the host runs its own."""
        self._reboots += 1
        if self._reboots > _REBOOTS:
            raise LabUnreachable(f"{self.plan.host}: went down {self._reboots} times under {trial.candidate.release}")
        self._machine.drop()
        trial.way_back.to_base()
        failure = trial.boot(parameters)
        if failure is not None:
            raise LabUnreachable(f"{self.plan.host}: {failure.text}, after it had booted before")

    def _see_which_kernel(self, tried: Tried) -> None:
        """Keep only results of the kernel on trial. Those that do not say under which they ran get its name.

        Suites of the user's own may ask nothing of tdxhw, and then nothing notes where they ran; but the kernel on
        trial was verified before them, and a reboot under them is noticed.
        """
        release = self.plan.candidate.release
        for number, results in enumerate(tried.results):
            told = [replace(one, provenance={"kernel": release, **one.provenance}) for one in results.results]
            kept = tuple(one for one in told if one.provenance["kernel"] == release)
            if len(kept) < len(told):
                others = {one.provenance["kernel"] for one in told} - {release}
                lost = len(told) - len(kept)
                tried.problems.append(f"{lost} results are of {', '.join(sorted(others))}, not of {release}")
            tried.results[number] = Results(kept, results.sources, results.notes)

    # ---- what goes along ----

    def _open_the_console(self, stack: ExitStack) -> None:
        capture = self._around.console()
        if capture is None:
            return
        self._capture = stack.enter_context(capture)
        if not capture.wait_open(_CONSOLE_S):
            self._course.note(f"its console is not there: {capture.problem or 'no answer'}; going on without")

    def _hear_it_out(self) -> None:
        """Wait until the console has what the kernel said until now: a serial line may be seconds behind."""
        if self._capture is None or self._capture.problem:
            return
        with suppress(LabUnreachable, RemoteFailed):
            last = f"{kernel_marks.HEAD}heard until {self._machine.boot().boot_id} {len(self._said())}"
            self._machine.link.run(f"echo '<4>{last}' >/dev/kmsg")
            until = self._around.clock.now() + _LAG_S
            while self._around.clock.now() < until and not any(last in line.text for line in self._said()[-_RECENT:]):
                self._around.clock.sleep(_LOOK_S)

    def _said(self) -> Sequence[ConsoleLine]:
        return self._capture.lines if self._capture is not None else ()

    def _tell_what_is_left(self) -> None:
        if self._way_back is not None and self._course.state is not State.RESTORED:
            name = self.plan.host
            left = (
                f"{name} {self._course.state.value}; `tdxhw validate --lab {name} --recover` removes what is left on it"
            )
            self.outcome.problems.append(left)

"""Boot the kernel on trial once, prove that it is the one running, and say truthfully what happened if it is not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from tdxhw.lab.console.findings import scan
from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.lab.kernel_command_line import halves
from tdxhw.validate import grub_menu, matrix
from tdxhw.validate.candidate import Candidate
from tdxhw.validate.course import Course
from tdxhw.validate.errors import ChangeFailed, WrongKernel
from tdxhw.validate.machine import FOLDER, Boot, Machine
from tdxhw.validate.speakers import said_by
from tdxhw.validate.states import Event
from tdxhw.validate.target import Target
from tdxhw.validate.way_back import BY_ITSELF, SWITCHED_ON, WayBack

CONFIRMED: Final = "/run/tdxhw-validate-confirmed"
_LAST_LINES: Final = 2  # of a console, where nothing better is known
_LONGEST: Final = 100  # of them [characters]
_ABOUT_SIGNATURES: Final = re.compile(r"signature|secure boot|verif|shim", re.IGNORECASE)
_PSTORE: Final = (
    "cat /sys/fs/pstore/dmesg-* /var/lib/systemd/pstore/*/dmesg.txt "
    "/var/lib/systemd/pstore/*/*/dmesg.txt 2>/dev/null | tail -n 2000"
)


@dataclass(frozen=True, slots=True)
class BootFailure:
    """The candidate did not come up, and the host's own kernel did."""

    text: str
    is_proven: bool  # the kernel itself said so; else it may have been the host's fault


@dataclass(frozen=True, slots=True)
class Trial:
    """What one boot of the candidate needs."""

    machine: Machine
    course: Course
    way_back: WayBack
    target: Target
    candidate: Candidate
    token: str  # stands on the command line of exactly this validation's boots
    kernel: str  # file names in /boot
    initrd: str
    boot_limit_s: float
    panic_s: int
    command_line: str = ""  # what the user adds
    console: Callable[[], Sequence[ConsoleLine]] = tuple  # what was on it so far

    def boot(self, parameters: dict[str, str]) -> BootFailure | None:
        """Boot the candidate with module parameters. Return how it failed to boot, None if it runs.

        Afterwards it runs, or the host's own kernel does. ``WrongKernel`` if another came up, ``Stranded`` if none
        did, ``ChangeFailed`` if the boot-once entry was not acted upon: none of them says anything about it.
        """
        before = self._arm(parameters)
        self.course.move(Event.REBOOT, f"boots {self.candidate.release} once" + _with(parameters))
        said_before, died_before = len(self.console()), self._pstore()
        self.machine.reboot()
        came = self.machine.wait_for_boot(before.boot_id, self.boot_limit_s)
        how, silent = BY_ITSELF, self.console()[said_before:]
        if came is None:
            self.course.move(Event.NO_ANSWER, f"no answer from {self.candidate.release} in {self.boot_limit_s:g} s")
            how = self.way_back.rescue()
            came = self.machine.boot()
        if self.way_back.is_candidate(came):
            proven = (
                "release, build id, boot id" if self.candidate.build_id else "release, boot id (it has no build id)"
            )
            self.course.move(Event.CANDIDATE_UP, f"runs {came}: {proven} and command line verified")
            if how != BY_ITSELF:
                raise ChangeFailed(f"{self.machine.name}: {self.candidate.release} came up only {how}")
            self.machine.link.run(f"touch {CONFIRMED}")
            self._see_the_parameters(parameters, came)
            return None
        if self.way_back.is_base(came):
            self.course.move(Event.BASE_UP, f"is back on {came} {how}")
            self._see_that_it_was_tried()
            if SWITCHED_ON in how:
                raise ChangeFailed(f"{self.machine.name}: its power was off: no kernel does that; it was {how}")
            died = [line for line in self._pstore() if line not in died_before]
            self.course.keep("pstore.txt", died)
            return self._why(silent if how != BY_ITSELF else self.console()[said_before:], died, how)
        self.course.move(Event.OTHER_UP, f"runs {came}")
        raise WrongKernel(
            f"{self.machine.name}: booted {came} with {came.cmdline!r}, not {self.candidate.release} "
            f"(build id {self.candidate.build_id or 'unknown'}): no verdict about another kernel"
        )

    def _arm(self, parameters: dict[str, str]) -> Boot:
        arguments = [self.target.rescue_arguments(self.panic_s), matrix.words(parameters), self.command_line]
        append = " ".join([self.token, *filter(None, arguments)])  # the user's may end with some for init
        menu = self.target.custom_menu(self.kernel, self.initrd, append)
        folder = self.target.grub_folder
        self.machine.change("write", path=f"{folder}/custom.cfg", text=menu)
        self.machine.change("boot-once", environment=f"{folder}/grubenv", entry=grub_menu.CANDIDATE)
        self.machine.link.run(f"rm -f {FOLDER}/guard.log")
        self.course.move(Event.ARM, "boots the candidate next, once")
        return self.machine.boot()

    def _see_the_parameters(self, parameters: dict[str, str], boot: Boot) -> None:
        """See that it was booted with them. What the modules made of them is for `not_as_asked`."""
        for_kernel, _ = halves(boot.cmdline)
        missing = set(matrix.words(parameters).split()) - set(for_kernel)
        if missing:
            raise WrongKernel(f"{self.machine.name}: booted without {' '.join(sorted(missing))}: {boot.cmdline!r}")

    def left_behind(self, hkids_used: int | None) -> list[str]:
        """Return what is still in use after the suites, though it was not before: a reboot would hide it."""
        if hkids_used is None or not self.way_back.is_candidate(self.machine.boot()):
            return []
        now = self.machine.hkids_used() or 0
        return [f"HKIDs in use: {hkids_used} before, {now} after: leaked"] if now > hkids_used else []

    def not_as_asked(self, parameters: dict[str, str]) -> list[str]:
        """Return where a module made something else of a parameter, one line each.

        To be asked after the suites: before them a module may not be loaded yet. Nothing if another kernel runs.
        """
        if not parameters or not self.way_back.is_candidate(self.machine.boot()):
            return []
        found = []
        for name, value in parameters.items():
            module, _, parameter = name.partition(".")
            shown = self.machine.text(f"/sys/module/{module}/parameters/{parameter}").strip()
            if shown and not matrix.is_in_effect(value, shown):
                found.append(f"{name} is {shown}, although {value} was asked for")
            elif not shown and self.machine.is_folder(f"/sys/module/{module}"):
                found.append(f"{name}={value} was asked for: {module} shows no such parameter")
            elif not shown:
                found.append(f"{name}={value} was asked for: {module} is not loaded")
        return found

    def _see_that_it_was_tried(self) -> None:
        """GRUB forgets the entry before it boots it: while it is still there, nothing was tried."""
        environment = self.machine.survey()["grub"]["environment"]
        if grub_menu.parse_environment(str(environment)).get("next_entry"):
            raise ChangeFailed(f"{self.machine.name}: GRUB did not act on the boot-once entry; the candidate never ran")

    def _pstore(self) -> list[str]:
        """Return what kernels left behind when they died; the host may have some of long ago."""
        return self.machine.link.run(_PSTORE).stdout.splitlines()

    def _why(self, said: Sequence[ConsoleLine], died: Sequence[str], how: str) -> BootFailure:
        """Say how the candidate failed, by the best evidence there is."""
        release = self.candidate.release
        its_own = said_by(said, release, str(self.target.survey["release"]))
        for lines in (its_own, [ConsoleLine(0.0, line) for line in died]):
            deadly = [finding for finding in scan(lines) if finding.kind in ("panic", "oops")]
            if deadly:
                return BootFailure(f"{release} panics at boot: {deadly[-1].text}", is_proven=True)
        secure_boot = bool(self.target.survey.get("secure_boot"))
        if complaint := _grub_complaint(said):
            if secure_boot and _ABOUT_SIGNATURES.search(complaint):
                raise ChangeFailed(
                    f"{self.machine.name}: Secure Boot refuses {release} ({complaint}): enrol the key that it is "
                    "signed with, or switch that off; no verdict about the kernel"
                )
            return BootFailure(f"GRUB cannot load {release}: {complaint}", is_proven=True)
        guard = self.machine.text(f"{FOLDER}/guard.log").splitlines()
        self.course.keep("guard.log", guard)
        if guard and guard[0].split()[:2] == ["up", release]:
            network = _network(guard)
            return BootFailure(f"{release} boots, but cannot be reached: {network}", is_proven=bool(network))
        if secure_boot and how == BY_ITSELF and not its_own:
            raise ChangeFailed(
                f"{self.machine.name}: came back at once without a word from {release}, and Secure Boot is on: its "
                "signature may have been refused; no verdict about the kernel"
            )
        told = ""
        if how != BY_ITSELF:  # else the last words are those of the kernel that came after it
            last = [line.text.strip()[:_LONGEST] for line in its_own if line.text.strip()][-_LAST_LINES:]
            told = f"; last on its console: {' / '.join(last) or 'nothing'}"
        text = f"{release} hangs at boot, or dies without a word (the host came back {how}){told}"
        return BootFailure(text, is_proven=False)


def _grub_complaint(said: Sequence[ConsoleLine]) -> str:
    """Return what GRUB said about the entry on trial before it loaded the host's own kernel instead."""
    lines = [line.text.strip() for line in said]
    start = next((number for number, line in enumerate(lines) if grub_menu.TITLE in line), len(lines))
    complaints = (line for line in takewhile(lambda line: "Linux version" not in line, lines[start:]))
    return next((line.removeprefix("error: ") for line in complaints if line.startswith("error: ")), "")


def _network(guard: Sequence[str]) -> str:
    """Return what the guard wrote down about the network before it rebooted."""
    if "unconfirmed" not in guard:
        return ""  # it was cut off before it wrote that down
    interfaces = takewhile(bool, guard[guard.index("unconfirmed") + 1 :])
    others = [" ".join(line.split()) for line in interfaces if line.split()[0] != "lo"]
    return ", ".join(others) or "it has no network interface"


def _with(parameters: dict[str, str]) -> str:
    return f" with {matrix.words(parameters)}" if parameters else ""

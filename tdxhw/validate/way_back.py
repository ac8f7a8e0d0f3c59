"""Bring a host back to its own kernel and to what it was, from wherever it is.

In this order: it reboots by itself (after a panic, by a watchdog, by the guard), it is told to, its power is used. What
no longer works is said, with what a person has to do.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tdxhw.errors import HarnessError
from tdxhw.lab.errors import LabUnreachable, LeaseLost
from tdxhw.lab.host_run import Rescue
from tdxhw.validate.course import Course
from tdxhw.validate.errors import Stranded
from tdxhw.validate.host_state import Difference, differences
from tdxhw.validate.machine import Boot, Machine
from tdxhw.validate.states import Event, State

if TYPE_CHECKING:
    from tdxhw.lab.power import Power

BY_ITSELF: Final = "by itself"
SWITCHED_ON: Final = "switched on"
_ANSWER_S: Final = 30.0
_TRIES: Final = 4
_BY_ITSELF: Final = 2  # times the boot limit: one for the guard, one for the boot that follows


class WayBack:
    """Knows the host's own kernel and how to have it back."""

    def __init__(
        self,
        machine: Machine,
        course: Course,
        base: Boot,
        *,
        token: str,
        release: str,
        build_id: str,
        boot_limit_s: float,
        power: "Callable[[], Power | None]",
    ) -> None:
        self._machine = machine
        self._course = course
        self._base = base
        self._token = token
        self._release = release
        self._build_id = build_id
        self._boot_limit_s = boot_limit_s
        self._open_power = power

    def is_base(self, boot: Boot) -> bool:
        """Whether a boot is one of the host's own kernel."""
        same = boot.release == self._base.release and boot.build_id == self._base.build_id
        return same and self._token not in boot.cmdline.split()

    def is_candidate(self, boot: Boot) -> bool:
        """Whether a boot is one of the kernel on trial, of this validation, and of exactly that build."""
        same = boot.release == self._release and (not self._build_id or boot.build_id == self._build_id)
        return same and self._token in boot.cmdline.split()

    # ---- a host that does not answer ----

    def rescue(self) -> str:
        """Have a host that does not answer come back; return how it did. ``Stranded`` says what a person has to do."""
        power = self._power()
        if power is None:
            wait_s = _BY_ITSELF * self._boot_limit_s
            self._course.note(
                f"does not answer, and its lab file has no power control that works; waiting {wait_s:g} s for its "
                "watchdog or guard to reboot it. Somebody may also reset it by hand: it boots its own kernel then"
            )
            if self._machine.answer(wait_s) is not None:
                return BY_ITSELF
            raise self._stranded("there is no power control")
        for press in ("reset", "cycle"):
            self._machine.see_that_it_is_ours(None)
            try:
                how = self._press(power, press)
            except HarnessError as error:
                self._course.note(str(error))
                continue
            self._course.move(Event.POWER, f"{how} ({power.name})")
            if self._machine.answer(self._boot_limit_s) is not None:
                return f"after power control ({how})"
            self._course.move(Event.NO_ANSWER, f"no answer {self._boot_limit_s:g} s after {how}")
        raise self._stranded(f"{power.name} does not bring it back")

    def press_if_lost(self, waited_s: float) -> Rescue:
        """Bring back a host that went down under a test: at once if its power is off, else after the boot limit.

        Return what was done. To be asked again and again while it does not answer, since `waited_s` [s].
        """
        power = self._power() if self._course.state is State.CANDIDATE and waited_s > _ANSWER_S else None
        if power is None:
            return Rescue.NOTHING
        self._machine.see_that_it_is_ours(None)
        try:
            if power.is_on() and waited_s < self._boot_limit_s:
                return Rescue.NOTHING
            self._course.move(Event.NO_ANSWER, "does not answer any more")
            how = self._press(power, "reset")
        except HarnessError as error:
            self._course.note(str(error))
            return Rescue.NOTHING
        self._course.move(Event.POWER, f"{how} ({power.name})")
        return Rescue.SWITCHED_ON if how == SWITCHED_ON else Rescue.RESET

    def _power(self) -> "Power | None":
        try:
            return self._open_power()
        except HarnessError as error:
            self._course.note(f"power control: {error}")
            return None

    @staticmethod
    def _press(power: "Power", press: str) -> str:
        if not power.is_on():
            power.on()
            return SWITCHED_ON
        if press == "reset":
            power.reset()
            return "reset"
        power.off()
        power.on()
        return "switched off and on"

    def _stranded(self, why: str) -> Stranded:
        self._course.move(Event.GIVE_UP)
        name = self._machine.name
        return Stranded(
            f"{name}: does not answer and {why}: reset it by hand, it boots {self._base.release} then; "
            f"afterwards `tdxhw validate --lab {name} --recover` removes what is left"
        )

    # ---- the way back ----

    def to_base(self) -> None:
        """Have the host run its own kernel. ``Stranded`` if that cannot be done."""
        for _ in range(_TRIES):
            boot = self._where()
            if self.is_base(boot):
                self._course.move(Event.BASE_UP, f"runs {boot}")
                return
            self._course.move(Event.CANDIDATE_UP if self.is_candidate(boot) else Event.OTHER_UP, f"runs {boot}")
            self._course.move(Event.REBOOT, f"reboots to {self._base.release}")
            try:
                self._machine.reboot()
                came = self._machine.wait_for_boot(boot.boot_id, self._boot_limit_s)
            except LeaseLost:
                raise
            except HarnessError as error:  # it does not go down, or is down already
                self._course.note(str(error))
                came = None
            if came is None:
                self._course.move(Event.NO_ANSWER, f"no answer in {self._boot_limit_s:g} s")
                self.rescue()
        boot = self._where()
        if self.is_base(boot):
            self._course.move(Event.BASE_UP, f"runs {boot}")
            return
        self._course.move(Event.OTHER_UP, f"runs {boot}")
        self._course.move(Event.GIVE_UP)
        raise Stranded(f"{self._machine.name}: boots {boot} again and again, not {self._base}: somebody has to look")

    def _where(self) -> Boot:
        """Return which boot the host is in; rescue it if it does not say."""
        boot = self._machine.answer(_ANSWER_S)
        if boot is not None:
            return boot
        self._course.move(Event.NO_ANSWER)
        # It may be on its way: whoever pulled its plug may have put it in again.
        if self._power() is not None or self._machine.answer(self._boot_limit_s) is None:
            self.rescue()
        return self._machine.boot()

    def restore(self, before: dict[str, object]) -> tuple[list[str], list[Difference]]:
        """Take back what was changed, from the host's own kernel; return what could not be, and what is different."""
        for attempt in range(_TRIES):
            try:
                self.to_base()
                failed = self._machine.undo()
                after = self._machine.survey()
                if not failed:
                    self._machine.end()
            except LabUnreachable as error:
                if attempt == _TRIES - 1 or isinstance(error, Stranded):
                    raise
                self._course.note(f"{error}; once more")
                continue
            found = differences(before, after)
            is_back = not failed and not any(one.is_ours for one in found)
            self._course.move(Event.UNDO if is_back else Event.UNDO_FAILED, "is as it was" if is_back else "")
            return failed, found
        raise AssertionError("unreachable: the last try returns or raises")

"""Roll back what a validation left on a host: one that died, that was interrupted twice, or that lost the host."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tdxhw.lab.errors import LabUnreachable
from tdxhw.lab.power import Power
from tdxhw.validate.course import Course
from tdxhw.validate.machine import Boot, Machine
from tdxhw.validate.states import State
from tdxhw.validate.surroundings import Surroundings
from tdxhw.validate.way_back import WayBack


def hold(around: Surroundings, machine: Machine, reason: str, say: Callable[[str], None], stack: ExitStack) -> None:
    """Have the host to ourselves until `stack` is closed, over all of its reboots."""
    holding = stack.enter_context(around.hold(machine.link, reason))
    machine.on_connected = holding.move_to
    machine.see_that_it_is_ours = holding.check
    if holding.note:
        say(holding.note)


def way_back(
    machine: Machine, course: Course, head: dict[str, Any], boot_limit_s: float, power: Callable[[], Power | None]
) -> WayBack:
    """Return the way back that the head of a journal describes."""
    return WayBack(
        machine, course, Boot.of(head["before"]), token=str(head["token"]), release=str(head["release"]),
        build_id=str(head["build_id"]), boot_limit_s=boot_limit_s, power=power,
    )  # fmt: skip


def recover_leftovers(
    machine: Machine, course: Course, power: Callable[[], Power | None], boot_limit_s: float, problems: list[str]
) -> bool:
    """Roll back what an earlier validation left; return whether there was something."""
    lines = machine.journal()
    if not lines:
        return False
    head = lines[0]["begin"]
    course.note(f"rolls back what a validation of {head['release']} by {head['owner']} left")
    failed, found = way_back(machine, course, head, boot_limit_s, power).restore(head["before"])
    problems += [f"left by an earlier validation: {one}" for one in failed]
    problems += [f"left by an earlier validation: {one}" for one in found if one.is_ours]
    course.state = State.BASE if not failed else course.state
    return True


def recover(host: str, around: Surroundings, boot_limit_s: float, say: Callable[[str], None]) -> list[str]:
    """Roll back what a validation left on a host, if anything; return what could not be. For ``--recover``."""
    problems: list[str] = []
    course = Course(host, None, say)
    machine = Machine(host, around.connect, clock=around.clock)
    with ExitStack() as stack:
        stack.callback(machine.drop)
        if machine.answer(0) is None:
            _reset(machine, course, around, boot_limit_s)
        hold(around, machine, "tdxhw validate --recover", say, stack)
        if not recover_leftovers(machine, course, around.power, boot_limit_s, problems):
            course.note(f"nothing to recover; runs {machine.boot()}")
    return problems


def _reset(machine: Machine, course: Course, around: Surroundings, boot_limit_s: float) -> None:
    """Have a host answer that does not, without knowing yet what is left on it."""
    power = around.power()
    if power is None:
        raise LabUnreachable(f"{machine.name}: does not answer, and there is no power control: reset it by hand first")
    if power.is_on():
        # It may be on its way, and for somebody else: who has it is known only when it answers.
        course.note(f"does not answer; waiting {boot_limit_s:g} s for it, then it is reset ({power.name})")
        if machine.answer(boot_limit_s) is not None:
            return
    course.note(f"does not answer; resetting it ({power.name})")
    power.reset()
    if machine.answer(boot_limit_s) is None:
        raise LabUnreachable(f"{machine.name}: does not answer {boot_limit_s:g} s after a reset")

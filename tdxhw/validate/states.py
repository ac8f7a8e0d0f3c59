"""The course of a validation as one table: in which state the host is, and what leads from there to where.

Wherever a validation is cut off, the table has a way from there to `State.RESTORED`, or says that a person is needed.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from tdxhw.errors import HarnessError


class State(Enum):
    """What the host is doing, as far as is known."""

    BASE = "runs its own kernel"
    PREPARED = "runs its own kernel, which is pinned as the default"
    INSTALLED = "runs its own kernel, and has the candidate"
    ARMED = "boots the candidate next, once"
    BOOTING = "is on its way to the candidate"
    CANDIDATE = "runs the candidate"
    RETURNING = "is on its way to its own kernel"
    ASTRAY = "runs a kernel that nobody asked for"
    LOST = "does not answer"
    BACK = "runs its own kernel again"
    RESTORED = "is as it was"
    DAMAGED = "is not as it was"
    STRANDED = "needs a person"


class Event(Enum):
    """What happened to it."""

    PINNED = "default pinned"
    INSTALL = "candidate installed"
    ARM = "boot-once entry chosen"
    REBOOT = "reboot"
    CANDIDATE_UP = "candidate is up"
    BASE_UP = "own kernel is up"
    OTHER_UP = "another kernel is up"
    NO_ANSWER = "no answer"
    POWER = "power control"
    GIVE_UP = "nothing is left to try"
    UNDO = "undone"
    UNDO_FAILED = "not undone"


_S, _E = State, Event
_ENDS: Final = (_S.RESTORED, _S.STRANDED)

# Wherever a host is looked for, it is found somewhere.
_FOUND: Final = {_E.BASE_UP: _S.BACK, _E.CANDIDATE_UP: _S.CANDIDATE, _E.OTHER_UP: _S.ASTRAY, _E.NO_ANSWER: _S.LOST}

# fmt: off
TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = MappingProxyType({
    **{(state, event): found for state in State if state not in _ENDS for event, found in _FOUND.items()},

    # The way there
    (_S.BASE,      _E.PINNED):       _S.PREPARED,
    (_S.PREPARED,  _E.INSTALL):      _S.INSTALLED,
    (_S.INSTALLED, _E.ARM):          _S.ARMED,
    (_S.ARMED,     _E.REBOOT):       _S.BOOTING,
    (_S.CANDIDATE, _E.ARM):          _S.ARMED,      # for the next parameters
    (_S.BACK,      _E.ARM):          _S.ARMED,      # once more, after a test took it down

    # The way back
    (_S.CANDIDATE, _E.REBOOT):       _S.RETURNING,
    (_S.ASTRAY,    _E.REBOOT):       _S.RETURNING,
    (_S.RETURNING, _E.CANDIDATE_UP): _S.ASTRAY,     # its entry was not only for once
    (_S.ASTRAY,    _E.CANDIDATE_UP): _S.ASTRAY,
    (_S.LOST,      _E.POWER):        _S.RETURNING,
    (_S.LOST,      _E.GIVE_UP):      _S.STRANDED,
    (_S.ASTRAY,    _E.GIVE_UP):      _S.STRANDED,
    (_S.BACK,      _E.UNDO):         _S.RESTORED,
    (_S.BACK,      _E.UNDO_FAILED):  _S.DAMAGED,
})
# fmt: on


_DRAWN: Final = {
    _E.BASE_UP: (_S.BOOTING, _S.CANDIDATE, _S.RETURNING, _S.LOST),
    _E.CANDIDATE_UP: (_S.BOOTING,),
    _E.OTHER_UP: (_S.BOOTING,),
    _E.NO_ANSWER: (_S.BOOTING, _S.CANDIDATE, _S.RETURNING),
}


class OffCourse(HarnessError):  # noqa: N818
    """Something happened that the table does not foresee: a mistake of ours."""


def next_state(state: State, event: Event) -> State:
    """Return the state that `event` leads to. ``OffCourse`` if the table has none."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise OffCourse(f"'{event.value}' while the host {state.value}: please report this") from None


def diagram() -> str:
    """Return the table as a Mermaid state diagram, for the documentation; without what is true in every state."""
    lines = [
        f"    {before.name} --> {after.name}: {event.value}"
        for (before, event), after in TRANSITIONS.items()
        if _FOUND.get(event) is not after or before in _DRAWN.get(event, ())
    ]
    ends = [f"    {state.name} --> [*]" for state in (*_ENDS, State.DAMAGED)]
    return "\n".join(["stateDiagram-v2", "    [*] --> BASE", *lines, *ends]) + "\n"

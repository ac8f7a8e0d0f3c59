"""The course of a validation as a table: every way there has a way back."""

import re
from pathlib import Path

import pytest

from tdxhw.validate.states import TRANSITIONS, Event, OffCourse, State, diagram, next_state

DOCS = Path(__file__).parents[3] / "docs" / "validate.md"
FOUND = (Event.BASE_UP, Event.CANDIDATE_UP, Event.OTHER_UP, Event.NO_ANSWER)
ENDS = (State.RESTORED, State.STRANDED)


def reachable(start: State) -> set[State]:
    found, new = set[State](), {start}
    while new:
        found |= new
        new = {after for (before, _), after in TRANSITIONS.items() if before in new} - found
    return found


def test_every_state_can_be_reached() -> None:
    assert reachable(State.BASE) == set(State)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDS])
def test_from_everywhere_there_is_a_way_to_a_host_that_is_as_it_was(state: State) -> None:
    assert State.RESTORED in reachable(state)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDS])
def test_wherever_a_host_is_found_the_table_knows_what_to_do(state: State) -> None:
    assert {next_state(state, event) for event in FOUND} <= {State.BACK, State.CANDIDATE, State.ASTRAY, State.LOST}


def test_only_the_own_kernel_is_where_everything_is_undone() -> None:
    assert {before for (before, event) in TRANSITIONS if event is Event.UNDO} == {State.BACK}


def test_the_candidate_is_only_booted_once_it_is_installed_and_chosen() -> None:
    assert {before for (before, event), after in TRANSITIONS.items() if after is State.BOOTING} == {State.ARMED}


def test_what_the_table_does_not_foresee_is_our_mistake() -> None:
    with pytest.raises(OffCourse, match="please report"):
        next_state(State.BASE, Event.REBOOT)


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    found = re.search(r"```mermaid\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == diagram()

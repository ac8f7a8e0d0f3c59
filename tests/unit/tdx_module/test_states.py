"""The state tables: consistent with each other, with the encodings, and with the page in docs/."""

from pathlib import Path

import pytest

from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.sept_states import ENCODING, PUBLIC, STATE_MASK, SeptState, state_of
from sim_backend.tdx_module.state_diagrams import DIAGRAMS, document
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_in_docs_is_drawn_from_the_tables() -> None:
    assert (DOCS / "tdx-module-states.md").read_text() == document()


@pytest.mark.parametrize(("title", "_file", "transitions"), DIAGRAMS, ids=[title for title, *_ in DIAGRAMS])
def test_every_state_of_a_diagram_is_one_of_its_machine(title: str, _file: str, transitions: object) -> None:
    assert isinstance(transitions, dict | type(op_states.TRANSITIONS))
    machines = {type(source) for source, _ in transitions} | {type(target) for target in transitions.values()}
    assert len(machines) == 1, title


@pytest.mark.parametrize("state", SeptState)
def test_an_entry_state_survives_its_encoding(state: SeptState) -> None:
    assert state_of(ENCODING[state]) == state
    assert state_of(ENCODING[state] | 0x000F_FFFF_FFFF_F000 | 0b111 | 1 << 63) == state


def test_encodings_are_distinct_and_within_the_state_bits() -> None:
    assert len(set(ENCODING.values())) == len(SeptState)
    assert all(not bits & ~STATE_MASK for bits in ENCODING.values())
    assert len(set(PUBLIC)) == len(SeptState)


@pytest.mark.parametrize("step", sept_states.TRANSITIONS, ids=str)
def test_a_leaf_makes_only_steps_that_its_gate_lets_pass(step: tuple[SeptState, SeamcallLeaf | TdcallLeaf]) -> None:
    state, leaf = step
    gate = sept_states.ALLOWED[leaf] if isinstance(leaf, SeamcallLeaf) else sept_states.ALLOWED_TDCALL[leaf]
    assert gate >> state & 1


@pytest.mark.parametrize("step", op_states.TRANSITIONS, ids=str)
def test_an_op_state_is_left_only_by_leaves_allowed_in_it(step: tuple[op_states.OpState, SeamcallLeaf]) -> None:
    state, leaf = step
    assert op_states.ALLOWED[leaf] >> state & 1


def test_tlb_tracking_is_needed_exactly_where_a_vcpu_may_run() -> None:
    assert op_states.ALLOWED[SeamcallLeaf.TDH_VP_ENTER] == op_states.TLB_TRACKING

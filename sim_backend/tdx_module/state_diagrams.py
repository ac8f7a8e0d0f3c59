"""Draws the state tables as Mermaid diagrams: docs/tdx-module-states.md is what `document` returns.

``python -m sim_backend.tdx_module.state_diagrams > docs/tdx-module-states.md`` after a table has changed.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, TypeAlias

from sim_backend.tdx_module import kot, op_states, pamt, sept_states, sys_state, tdr, tdvps

Transitions: TypeAlias = Mapping[Any, Enum]
"""(state, leaf or event) -> state."""

DIAGRAMS: Final[tuple[tuple[str, str, Transitions], ...]] = (
    ("The module", "sys_state.py", sys_state.TRANSITIONS),
    ("Life of a TD: TDR.LIFECYCLE_STATE", "tdr.py", tdr.TRANSITIONS),
    ("Operation of a TD: TDCS.OP_STATE", "op_states.py", op_states.TRANSITIONS),
    ("A private HKID in the KOT", "kot.py", kot.TRANSITIONS),
    ("A vCPU: TDVPS.VCPU_STATE", "tdvps.py", tdvps.TRANSITIONS),
    ("A physical page in the PAMT", "pamt.py", pamt.TRANSITIONS),
    ("An entry of the Secure EPT", "sept_states.py", sept_states.TRANSITIONS),
)


_INTRODUCTION: Final = (
    "Drawn from the tables in `sim_backend/tdx_module/`. Do not edit: "
    "`python -m sim_backend.tdx_module.state_diagrams` writes it anew, and a test compares."
)


def _event(event: Any) -> str:
    """Return the spec's way to write a leaf: TDH.MEM.PAGE.ADD."""
    return event.name.replace("_", ".") if isinstance(event, Enum) else str(event).replace("_", ".")


def diagram(transitions: Transitions) -> str:
    """Return one Mermaid state diagram; leaves that make the same step share an arrow."""
    arrows = defaultdict(list)
    for (source, event), target in transitions.items():
        arrows[source.name, target.name].append(_event(event))
    lines = [f"    {source} --> {target}: {', '.join(events)}" for (source, target), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def document() -> str:
    """Return the whole page."""
    parts = ["# States of the TDX module model", _INTRODUCTION]
    for title, file, transitions in DIAGRAMS:
        parts += [f"## {title}", f"Table: `{file}`.", diagram(transitions)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())

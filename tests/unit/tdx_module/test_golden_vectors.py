"""The module answers every recorded vector as the real module 1.5.01 did."""

from pathlib import Path

import pytest

from sim_backend.replay import Divergence, replay

VECTORS = sorted((Path(__file__).parents[2] / "golden" / "tdx_module").glob("*.jsonl.gz"))


def test_the_vectors_are_there() -> None:
    assert len(VECTORS) == 15


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.name.partition(".")[0])
def test_every_record_agrees(path: Path) -> None:
    records = 0
    divergences: list[Divergence] = []
    for _, divergence in replay(path):
        records += 1
        if divergence is not None:
            divergences.append(divergence)
    story = "\n".join(
        f"record {each.record['i']} ({each.note}):\n  expected {each.expected}\n  got      {each.got}"
        for each in divergences[:3]
    )
    assert records > 100
    assert not divergences, f"{len(divergences)} of {records} records diverge\n{story}"

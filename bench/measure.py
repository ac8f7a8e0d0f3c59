"""Timing a callable so that the figure can be trusted on a shared machine: best of several batches.

The minimum is quoted because noise on a shared host only ever adds time. Both sides of a ratio are
measured alternately in the same process, so that a slow phase of the machine hits both.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

BATCHES: Final = 7


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report: ours against a bound or a peer, and what it should be."""

    name: str
    ours: str
    peer: str
    ratio: float
    target: float
    sense: Literal["<=", ">="]

    @property
    def met(self) -> bool:
        """Tell whether the ratio reaches the target."""
        return self.ratio <= self.target if self.sense == "<=" else self.ratio >= self.target


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Return the mean time of one of `calls` calls [s], loop overhead included."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    calls: int,
    peer_calls: int | None = None,
    *,
    batches: int = BATCHES,
) -> tuple[float, float]:
    """Return the best time of one call of each [s], measured in turn.

    Many short batches find a quiet moment of a busy machine, for either side, that few long ones do not.
    """
    best_ours = best_peer = float("inf")
    for _ in range(batches):
        best_ours = min(best_ours, seconds_per_call(ours, calls))
        best_peer = min(best_peer, seconds_per_call(peer, peer_calls or calls))
    return best_ours, best_peer


def duration(seconds: float) -> str:
    """Return a time with three figures and a fitting unit."""
    for limit, scale, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"

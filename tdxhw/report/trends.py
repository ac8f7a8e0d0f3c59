"""How tests did over kernels, as pictures for the page: pass rate, duration, and the tests that changed.

Drawn here as coordinates; the page only puts them into SVG. Every picture has its numbers beside it as a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final

from tdxhw.report.kernel_order import kernel_order

WIDTH: Final = 560
HEIGHT: Final = 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 58  # margins; releases are written aslant below
_MOST_LABELS: Final = 10
_LONGEST_LABEL: Final = 17  # [characters]; the dot's own text has the whole release
_MOST_ROWS: Final = 40
_CELL: Final = 14
_SLOWER_FACTOR: Final = 2.0
_SLOWER_FLOOR_S: Final = 0.5

Points = Mapping[str, Mapping[str, "KernelPoint"]]
"""``{kernel: {suite::test: point}}``."""


@dataclass(frozen=True, slots=True)
class KernelPoint:
    """One test under one kernel."""

    passed: int
    failed: int
    duration_s: float | None  # mean of those that passed [s]

    @property
    def state(self) -> str:
        """``pass``, ``fail``, or ``mixed``."""
        return "mixed" if self.passed and self.failed else "fail" if self.failed else "pass"


@dataclass(frozen=True, slots=True)
class Dot:
    """One value."""

    x: float
    y: float
    told: str  # "6.18.0: 310 of 312 passed (99.4 %)"
    bad: bool


@dataclass(frozen=True, slots=True)
class Label:
    """A text at an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One line over kernels."""

    name: str
    summary: str  # for who does not see it
    dots: tuple[Dot, ...]
    values: tuple[Label, ...]  # at y
    kernels: tuple[Label, ...]  # at x

    @property
    def line(self) -> str:
        """The points of the SVG polyline."""
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


@dataclass(frozen=True, slots=True)
class Cell:
    """One test under one kernel, in a row of them."""

    x: int
    state: str  # as of `KernelPoint`; "none": it did not run
    told: str


@dataclass(frozen=True, slots=True)
class Row:
    """A test that failed somewhere or changed its duration."""

    name: str
    cells: tuple[Cell, ...]
    duration: str  # "0.41 → 1.90 s, 4.6 times as long"

    @property
    def summary(self) -> str:
        """Everything in words."""
        return "; ".join(cell.told for cell in self.cells)


@dataclass(frozen=True, slots=True)
class Line:
    """The numbers of one kernel."""

    kernel: str
    passed: int
    failed: int
    rate: str
    duration: str


@dataclass(frozen=True, slots=True)
class Trends:
    """Everything over kernels, of one kind of machine."""

    kind: str  # "hardware", "simulator"
    hosts: tuple[str, ...]
    charts: tuple[Chart, ...]
    lines: tuple[Line, ...]
    rows: tuple[Row, ...]
    left_out: int  # changed tests that are not shown
    compared: int  # tests whose duration is in the picture
    missing: tuple[str, ...]  # kernels of the page that the history does not have


def trends(kind: str, hosts: Sequence[str], points: Points, on_page: Sequence[str] = ()) -> Trends:
    """Return the pictures. `on_page` are the kernels whose results the page shows."""
    kernels = sorted(points, key=kernel_order)
    lines, rates = [], []
    everywhere = _passed_everywhere(kernels, points)
    seconds = [sum(points[kernel][name].duration_s or 0.0 for name in everywhere) for kernel in kernels]
    for kernel, taken_s in zip(kernels, seconds, strict=True):
        passed = sum(point.passed for point in points[kernel].values())
        failed = sum(point.failed for point in points[kernel].values())
        rate = 100 * passed / (passed + failed) if passed + failed else 0.0
        rates.append(rate)
        lines.append(Line(kernel, passed, failed, _percent(rate, failed), _seconds(taken_s) if everywhere else "-"))
    charts = []
    if len(kernels) > 1:
        told = [f"{line.kernel}: {line.passed} of {line.passed + line.failed} passed ({line.rate})" for line in lines]
        lowest = max(0.0, min(90.0, floor(min(rates) / 10) * 10))
        bad = [line.failed > 0 for line in lines]
        charts.append(_chart("pass rate", kernels, rates, told, bad, (lowest, 100.0), "%"))
        if everywhere:
            told = [f"{line.kernel}: {line.duration}" for line in lines]
            charts.append(
                _chart("duration", kernels, seconds, told, [False] * len(told), (0.0, _round_up(max(seconds))), "s")
            )
    changed = _changed(kernels, points)
    missing = tuple(sorted({kernel for kernel in on_page if kernel not in points}, key=kernel_order))
    return Trends(
        kind, tuple(hosts), tuple(charts), tuple(lines), tuple(changed[:_MOST_ROWS]),
        max(0, len(changed) - _MOST_ROWS), len(everywhere), missing,
    )  # fmt: skip


def _passed_everywhere(kernels: Sequence[str], points: Points) -> list[str]:
    """Return the tests that passed under every kernel: only their times can be added up and compared."""
    if not kernels:
        return []
    first, *others = kernels
    return [
        name
        for name in points[first]
        if all(name in points[kernel] and points[kernel][name].duration_s is not None for kernel in (first, *others))
    ]


def _chart(
    name: str,
    kernels: Sequence[str],
    values: Sequence[float],
    told: Sequence[str],
    bad: Sequence[bool],
    scale: tuple[float, float],
    unit: str,
) -> Chart:
    low, high = scale
    across, down = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def y_of(value: float) -> float:
        return _TOP + down * (high - value) / (high - low)

    dots = tuple(
        Dot(_LEFT + across * (index + 0.5) / len(values), y_of(value), told[index], bad[index])
        for index, value in enumerate(values)
    )
    steps = [low + (high - low) * part / 4 for part in range(5)]
    every = ceil(len(kernels) / _MOST_LABELS)
    written = [
        Label(dot.x, kernel if len(kernel) <= _LONGEST_LABEL else kernel[: _LONGEST_LABEL - 1] + "…")
        for index, (dot, kernel) in enumerate(zip(dots, kernels, strict=True))
        if (len(kernels) - 1 - index) % every == 0  # the newest always has its name
    ]
    return Chart(
        name,
        f"{name} over {len(kernels)} kernels, from {told[0]} to {told[-1]}",
        dots,
        tuple(Label(y_of(value), f"{value:g} {unit}") for value in steps),
        tuple(written),
    )


def _changed(kernels: Sequence[str], points: Points) -> list[Row]:
    """Return the tests that are not green everywhere or whose duration changed, what fails now first."""
    found = []
    for name in dict.fromkeys(name for kernel in kernels for name in points[kernel]):
        mine = [points[kernel].get(name) for kernel in kernels]
        times = [point.duration_s for point in mine if point is not None and point.duration_s is not None]
        slower = (
            bool(times) and max(times) - min(times) >= _SLOWER_FLOOR_S and max(times) >= _SLOWER_FACTOR * min(times)
        )
        failed = [index for index, point in enumerate(mine) if point is not None and point.failed]
        if not failed and not slower:
            continue
        cells = tuple(_cell(index, kernel, mine[index]) for index, kernel in enumerate(kernels))
        row = Row(name, cells, _change(times))
        found.append((-(failed[-1] if failed else -1), -len(failed), name, row))
    return [row for *_, row in sorted(found, key=lambda entry: entry[:3])]


def _change(times: Sequence[float]) -> str:
    if not times:
        return "-"
    told = f"{times[0]:.2f} → {times[-1]:.2f} s"
    slower = times[-1] - times[0] >= _SLOWER_FLOOR_S and times[-1] >= _SLOWER_FACTOR * times[0]
    return f"{told}, {times[-1] / times[0]:.1f} times as long" if slower and times[0] else told


def _cell(index: int, kernel: str, point: KernelPoint | None) -> Cell:
    x = index * _CELL
    if point is None:
        return Cell(x, "none", f"{kernel}: did not run")
    told = {
        "pass": f"{kernel}: passed",
        "fail": f"{kernel}: failed",
        "mixed": f"{kernel}: failed {point.failed} of {point.passed + point.failed}",
    }[point.state]
    return Cell(x, point.state, told + (f" ({point.duration_s:.2f} s)" if point.duration_s is not None else ""))


def _percent(rate: float, failed: int) -> str:
    # 9,999 of 10,000 are not "100 %".
    return "100 %" if not failed else f"{min(rate, 99.9):.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def _round_up(value: float) -> float:
    """Return the next 1, 2, 4 or 5 times a power of ten, whose quarters are short numbers; a millisecond at least."""
    if value <= 0:
        return 1.0
    value = max(value, 0.001)
    power: float = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 4, 5, 10) if value <= step * power * 1.000001)

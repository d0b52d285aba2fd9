"""Charts as geometry: where the points, lines and cells of a report's drawings stand, in SVG units.

Axes of errors are logarithmic. A zero stands on the floor of its chart and what is no finite number on the
ceiling, so that every figure has its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from converters.reports.dossier import Mutant, Tap

__all__ = ["Bar", "Cell", "DepthChart", "Heatmap", "Point", "Tick", "depth_chart", "heatmap", "margin_bars"]

WIDTH, HEIGHT = 880.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 44.0, 34.0  # margins
COLUMNS, CELL = 32, 22.0
SHADES = 6
BAR = 140.0


@dataclass(frozen=True)
class Point:
    """A module in the depth chart."""

    x: float
    y: float
    tap: Tap
    error: float | None
    passed: bool


@dataclass(frozen=True)
class Tick:
    """A label of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class DepthChart:
    """Errors of modules in order of execution."""

    errors: tuple[Point, ...]
    local: tuple[Point, ...]
    bound: str  # an SVG path
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    diverges: Point | None
    culprit: Point | None
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    @property
    def marks(self) -> list[tuple[Point, str, float]]:
        """What is marked in the chart, and the height of its label."""
        if self.diverges and self.culprit and self.diverges.x == self.culprit.x:
            return [(self.culprit, "culprit and first divergence", 12.0)]
        marks = ((self.culprit, "culprit", 12.0), (self.diverges, "first divergence", 28.0))
        return [(point, label, y) for point, label, y in marks if point]

    @property
    def line(self) -> str:
        """The points of the end-to-end errors, for a polyline."""
        return " ".join(f"{point.x},{point.y}" for point in self.errors)


@dataclass(frozen=True)
class Cell:
    """A channel; shade 0 is within the bound, and SHADES + 1 no finite number."""

    x: float
    y: float
    channel: int
    error: float | None
    shade: int


@dataclass(frozen=True)
class Heatmap:
    """The channels of a module's output, shaded by the logarithm of their errors."""

    cells: tuple[Cell, ...]
    legend: tuple[tuple[int, str], ...]  # shade, what it means
    width: float
    height: float
    size: float = CELL


@dataclass(frozen=True)
class Bar:
    """A mutant with its margin as a bar from `x`; `one` is where error and bound are equal."""

    mutant: Mutant
    x: float
    length: float
    one: float
    width: float = BAR


def depth_chart(taps: Iterable[Tap], divergence: Tap | None, culprit: str | None) -> DepthChart | None:
    """The chart of these taps; None where there are none."""
    modules = sorted(taps, key=lambda tap: tap.depth)
    if not modules:
        return None
    shown = [tap.error for tap in modules] + [tap.local_error for tap in modules if tap.local_passed is not None]
    low, high = _decades([*shown, *(tap.bound for tap in modules)])
    zero, endless = 0.0 in shown, not all(map(_finite, shown))
    every, decades = math.ceil(len(modules) / 16), math.ceil((high - low) / 9)
    labels = [(float(f"1e{power}"), f"1e{power}") for power in range(low, high + 1, decades)]
    labels += [(0.0, "0")] * zero + [(math.inf, "NaN")] * endless
    low, high = low - zero, high + endless
    step = (WIDTH - LEFT - RIGHT) / len(modules)
    xs = [round(LEFT + (index + 0.5) * step, 1) for index in range(len(modules))]

    def y(value: float | None) -> float:
        return round(HEIGHT - BOTTOM - _height(value, low, high) * (HEIGHT - TOP - BOTTOM), 1)

    errors = [Point(x, y(tap.error), tap, tap.error, tap.passed) for x, tap in zip(xs, modules, strict=True)]
    local = [
        Point(x, y(tap.local_error), tap, tap.local_error, tap.local_passed)
        for x, tap in zip(xs, modules, strict=True)
        if tap.local_passed is not None
    ]
    return DepthChart(
        tuple(errors),
        tuple(local),
        _staircase([(x, y(tap.bound)) for x, tap in zip(xs, modules, strict=True) if tap.bound], step),
        tuple(Tick(y(value), label) for value, label in labels),
        tuple(Tick(x, str(index)) for index, x in enumerate(xs) if index % every == 0),
        next((point for point in errors if divergence and point.tap.target == divergence.target), None),
        next((point for point in local if point.tap.target == culprit), None),
    )


def heatmap(channels: Sequence[float | None], bound: float | None) -> Heatmap | None:
    """The chart of these errors, one for each channel; None where there are none."""
    if not channels:
        return None
    known = [error for error in channels if error and math.isfinite(error)]
    low = math.log10(bound or min(known, default=1.0))
    high = max(math.log10(max(known, default=1.0)), low + 1)

    def shade(error: float | None) -> int:
        if error is None or not math.isfinite(error):
            return SHADES + 1
        if not error or math.log10(error) <= low:
            return 0
        return min(SHADES, 1 + int((math.log10(error) - low) / (high - low) * SHADES))

    cells = tuple(
        Cell(index % COLUMNS * CELL, index // COLUMNS * CELL, index, error, shade(error))
        for index, error in enumerate(channels)
    )
    edges = [10 ** (low + (high - low) * (part + 1) / SHADES) for part in range(SHADES)]
    legend = [(0, "within the bound"), *((part + 1, f"to {edge:.0e}") for part, edge in enumerate(edges))]
    if any(cell.shade > SHADES for cell in cells):
        legend.append((SHADES + 1, "not finite"))
    rows = math.ceil(len(channels) / COLUMNS)
    return Heatmap(cells, tuple(legend), min(len(channels), COLUMNS) * CELL, rows * CELL)


def margin_bars(mutants: Iterable[Mutant]) -> tuple[Bar, ...]:
    """A bar for each mutant, the weakest first. Bars reach from 1, where a mutant would pass, to its margin."""
    ordered = sorted(mutants, key=lambda mutant: (mutant.detected, _size(mutant.margin)))
    low, high = _decades([1.0, *(mutant.margin for mutant in ordered)])
    one = _height(1.0, low, high) * BAR

    def bar(mutant: Mutant) -> Bar:
        end = _height(mutant.margin, low, high) * BAR
        return Bar(mutant, round(min(one, end), 1), round(max(abs(end - one), 1.0), 1), round(one, 1))

    return tuple(map(bar, ordered))


def _decades(figures: Iterable[float | None]) -> tuple[int, int]:
    """Whole powers of ten around all figures that have a logarithm."""
    powers = [math.log10(figure) for figure in figures if figure and figure > 0 and math.isfinite(figure)]
    low, high = math.floor(min(powers, default=-16.0)), math.ceil(max(powers, default=0.0))
    return low, max(high, low + 1)


def _height(value: float | None, low: int, high: int) -> float:
    """Where a figure stands between floor (0) and ceiling (1)."""
    if value is None or not _finite(value):
        return 1.0
    return min(max((math.log10(value) - low) / (high - low), 0.0), 1.0) if value > 0 else 0.0


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _size(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _staircase(places: Sequence[tuple[float, float]], step: float) -> str:
    """A path that is level across each place."""
    half = step / 2
    return "M" + " L".join(f"{x - half:.1f},{y} {x + half:.1f},{y}" for x, y in places) if places else ""

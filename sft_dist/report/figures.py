"""Curves as SVG paths for the report: a few kilobytes for any number of steps, and no peak lost.

A plot is a box of SIZE x SIZE that the page stretches; labels stand beside it as text, so that they stay legible at any
width. Values become paths here; colours are the page's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.report.data import Series

SIZE = 1000
NUM_BUCKETS = 500
"""A line has two points in each: the least and the greatest value of so many stretches of steps."""
NUM_ROWS = 12
"""Of the table under a chart."""


@dataclass(frozen=True)
class Line:
    """One line of a chart. kind: how the page draws it: raw, smooth, dots, or run-N of several runs."""

    label: str
    kind: str
    series: Series

    @property
    def finite(self) -> Series:
        steps, values = self.series
        keep = np.isfinite(values)
        return steps[keep], values[keep]


@dataclass(frozen=True)
class Mark:
    """A step that is marked on all charts. kind: restart, change, withheld."""

    kind: str
    step: int


@dataclass(frozen=True)
class Axis:
    """A range of values, and where they lie from 0 to 1."""

    low: float
    high: float
    is_log: bool = False

    def place(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        if self.is_log:
            return np.asarray(np.log(values / self.low) / math.log(self.high / self.low), np.float64)
        return np.asarray((values - self.low) / (self.high - self.low), np.float64)

    def ticks(self) -> list[float]:
        """Round values inside."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high) + 1e-9) + 1)
            marks = [10.0**power for power in powers]
            if len(marks) <= 3:
                marks = [step * mark for mark in marks for step in (1, 2, 5)]
            inside = [mark for mark in marks if self.low * (1 - 1e-9) <= mark <= self.high * (1 + 1e-9)]
            return inside[:: max(1, math.ceil(len(inside) / 5))] or [self.low, self.high]
        step = round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Chart:
    """A chart of several lines over steps. unit: behind the numbers of its table."""

    id: str
    title: str
    caption: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    is_log: bool = False
    from_zero: bool = False
    to_one: bool = False
    digits: int = 4
    first_step: int = 1
    last_step: int = 1

    def drawn(self) -> dict[str, Any]:
        """What the template needs: paths, ticks and marks in percent, and a table of some of the values."""
        shown = [line for line in self.lines if len(line.finite[0])]
        axis = value_axis([line.finite[1] for line in shown], is_log=self.is_log, from_zero=self.from_zero)
        if self.to_one:
            axis = Axis(0.0, 1.0)
        across = Axis(self.first_step, max(self.last_step, self.first_step + 1))
        return {
            "id": self.id,
            "title": self.title,
            "caption": self.caption,
            "lines": [
                {
                    "label": line.label,
                    "kind": line.kind,
                    "path": _dots(line, across, axis) if line.kind.startswith("dots") else _path(line, across, axis),
                    "count": len(line.series[0]),
                }
                for line in shown
            ],
            "y_ticks": [
                {"top": f"{100 * (1 - place):.2f}", "label": number_text(tick)}
                for tick, place in zip(axis.ticks(), axis.place(np.array(axis.ticks())), strict=True)
            ],
            "x_ticks": _step_ticks(across),
            "marks": [
                {"kind": mark.kind, "x": place, "step": mark.step}
                for mark in self.marks
                for place in _places(np.array([mark.step]), across)
            ],
            "table": _table(shown, digits=self.digits),
            "is_log": axis.is_log,
        }


def value_axis(values: Sequence[NDArray[np.float64]], *, is_log: bool, from_zero: bool) -> Axis:
    """The range of all values with a little room; one that is not empty for a single value."""
    every = np.concatenate(values) if values else np.array([0.0, 1.0])
    if is_log and (every > 0).any():
        positive = every[every > 0]
        low, high = float(positive.min()), float(positive.max())
        return Axis(low / 1.1, high * 1.1, is_log=True) if high > low else Axis(low / 2, high * 2, is_log=True)
    low, high = float(every.min()), float(every.max())
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero else low - room, high + room)


def decimate(series: Series, *, num_buckets: int = NUM_BUCKETS) -> Series:
    """The least and the greatest value of each bucket, in their order; all of a series that is short."""
    steps, values = series
    if len(steps) <= 2 * num_buckets:
        return series
    edges = np.linspace(0, len(steps), num_buckets + 1).astype(np.int64)
    kept = {0, len(steps) - 1}
    for first, last in pairwise(edges):
        kept |= {int(first + values[first:last].argmin()), int(first + values[first:last].argmax())}
    places = np.array(sorted(kept))
    return steps[places], values[places]


def smoothed(series: Series) -> Series:
    """An exponential mean over a fiftieth of the run, corrected for its beginning; values that are not finite are
    left out."""
    steps, values = series
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    share = 2 / (max(9.0, len(values) / 50) + 1)
    found = np.empty_like(values)
    mean = weight = 0.0
    for place, value in enumerate(values):
        mean += share * (value - mean)
        weight += share * (1 - weight)
        found[place] = mean / weight
    return steps, found


def _path(line: Line, across: Axis, axis: Axis) -> str:
    """A line as an SVG path, broken where a value is missing on a logarithmic axis or was not finite."""
    steps, values = line.finite
    if axis.is_log:
        steps, values = steps[values > 0], values[values > 0]
    steps, values = decimate((steps, values))
    points = list(zip(_places(steps, across), _places(values, axis, flipped=True), strict=True))
    if len(points) == 1:
        return f"M{points[0][0]} {points[0][1]}h0"
    return "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""


def _dots(line: Line, across: Axis, axis: Axis) -> str:
    """Lines of no length, whose round ends the page draws as dots: circles would be stretched with the box."""
    steps, values = line.finite
    xs, ys = _places(steps, across), _places(values, axis, flipped=True)
    return "".join(f"M{x} {y}h0" for x, y in zip(xs, ys, strict=True))


def _places(values: NDArray[Any], axis: Axis, *, flipped: bool = False) -> list[str]:
    places = axis.place(values) if len(values) else np.zeros(0)
    shown = SIZE * (1 - places if flipped else places)
    return [f"{place:.1f}".removesuffix(".0") for place in shown]


def _step_ticks(across: Axis) -> list[dict[str, str]]:
    """Round steps, and the last; none so close to it that their labels would touch."""
    step = max(1, round_step((across.high - across.low) / 4))
    inner = [i for i in np.arange(0, across.high, step) if i > across.low]
    places = [(float(across.place(np.array([tick]))[0]), tick) for tick in [across.low, *inner, across.high]]
    kept = [(place, tick) for place, tick in places if place in (0.0, 1.0) or 0.12 < place < 0.82]
    return [{"left": f"{100 * place:.2f}", "label": f"{int(tick):,}"} for place, tick in kept]


def _table(lines: Iterable[Line], *, digits: int) -> dict[str, Any]:
    """Some of the values: the first and the last step of each line, and some between. What is smoothed is none."""
    columns = [line for line in lines if (line.label, line.kind) != ("smoothed", "smooth")]
    steps = sorted({int(step) for line in columns for step in _some(line.series[0])})
    values = [dict(zip(line.series[0].tolist(), line.series[1].tolist(), strict=True)) for line in columns]
    rows = [
        [f"{step:,}", *("" if step not in column else exact_text(column[step], digits) for column in values)]
        for step in steps
    ]
    return {"names": [line.label for line in columns], "rows": rows}


def _some(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    return steps[np.unique(np.linspace(0, len(steps) - 1, min(NUM_ROWS, len(steps))).round().astype(np.int64))]


def exact_text(value: float, digits: int) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


def number_text(value: float) -> str:
    """A tick: "0.25", "1.5k", "2e-05"."""
    size = abs(value)
    if size >= 10_000:
        power, unit = next((p, u) for p, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= p)
        return f"{value / power:g}{unit}"
    return f"{value:.6g}" if size >= 1e-3 or value == 0 else f"{value:.3g}"


def round_step(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))

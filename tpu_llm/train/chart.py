"""Line charts and heat maps as plain HTML and SVG: they scale to any width, follow the page's light or dark colours,
print, and need a script only for the read-out under the pointer.

The lines are drawn in a viewBox that is stretched to the chart's box while strokes keep their width; every
label is HTML, so that text has the same size on a phone as on a wide screen.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

from tpu_llm.train.progress import short

Point = tuple[float, float]

WIDTH, HEIGHT = 1000, 1000  # of the stretched viewBox
BUCKETS = 400  # a longer series is drawn by the lowest and the highest value of each of these
SMOOTH_PARTS = 100
OFF_CHART = 4  # a highest value this many times the 99th percentile is a spike, and does not set the scale


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line, or dots; `faint` for one that only lies behind another."""

    name: str
    points: Sequence[Point]
    look: Literal['line', 'dots', 'faint'] = 'line'
    color: int = 1  # the page defines --color-1, --color-2 …


def chart(title: str, unit: str, series: Sequence[Series], marks: Sequence[tuple[str, float]] = ()) -> str:
    """A `<figure>` with a legend, axes and lines over steps from 0; `marks` are labelled horizontal lines.

    Values that are not finite leave gaps, and the caption counts them.
    """
    finite = [dataclasses.replace(one, points=_finite(one.points)) for one in series]
    drawn = [one for one in finite if one.points]
    if not drawn:
        return ''
    low, high, spike = _range([y for one in drawn for _, y in one.points], [y for _, y in marks])
    last = max(one.points[-1][0] for one in drawn)
    frame = _Frame(0.0, max(last, 1.0), *_widen(low, high))
    bad = sum(len(before.points) - len(after.points) for before, after in zip(series, finite, strict=True))
    notes = [f'highest {number(spike)}, off the chart'] if spike is not None else []
    notes += [f'{bad} not finite'] if bad else []
    return f"""<figure class="chart">
<figcaption><h3>{escape(title)}</h3> <span class="unit">{escape('; '.join([unit, *notes]))}</span>
{_legend(drawn)}</figcaption>
<div class="plot" role="img" tabindex="0" aria-label="{escape(_spoken(title, unit, drawn, marks))}">
{_grid(frame, marks)}
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">
{''.join(_path(one, frame) for one in sorted(drawn, key=lambda one: one.look != 'faint'))}
</svg>
<div class="cursor" hidden></div><output class="readout" hidden></output>
<script type="application/json">{_data(drawn, frame)}</script>
</div>
</figure>"""


def heat_map(title: str, unit: str, rows: Sequence[Sequence[float]], names: Sequence[str], full: float) -> str:
    """A `<figure>` with a line of cells a row, named at the left: blank at 0, in full colour from `full` on."""
    down, across = len(rows), len(rows[0])
    shades: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            shades.setdefault(round(10 * min(value / full, 1.0)), []).append(f'M{x} {y}h1v1h-1z')
    cells = ''.join(f'<path style="opacity:{shade / 10}" d="{"".join(d)}"/>' for shade, d in sorted(shades.items()))
    every = -(-down // 16)
    labels = [
        f'<span class="y" style="top:{100 * (y + 0.5) / down:.2f}%">{escape(name)}</span>'
        for y, name in enumerate(names)
        if y % every == 0
    ]
    labels += [
        f'<span class="x" style="left:{100 * (x + 0.5) / across:.2f}%">{number(x)}</span>'
        for x in ticks(0, across - 0.5)
        if x == int(x)
    ]
    lowest, highest = min(map(min, rows)), max(map(max, rows))
    spoken = f'{title}, {unit}: from {number(lowest)} to {number(highest)}'
    return f"""<figure class="chart">
<figcaption><h3>{escape(title)}</h3> <span class="unit">{escape(unit)}</span></figcaption>
<div class="heat" role="img" aria-label="{escape(spoken)}">
<div class="axes" aria-hidden="true">{''.join(labels)}</div>
<svg viewBox="0 0 {across} {down}" preserveAspectRatio="none" aria-hidden="true">{cells}</svg>
</div>
</figure>"""


@dataclasses.dataclass(frozen=True, slots=True)
class _Frame:
    """The corners of the plot in the data's units."""

    left: float
    right: float
    bottom: float
    top: float

    def across(self, x: float) -> float:
        return (x - self.left) / (self.right - self.left)

    def down(self, y: float) -> float:
        return (self.top - y) / (self.top - self.bottom)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _range(values: list[float], marks: list[float]) -> tuple[float, float, float | None]:
    """The lowest and the highest value to show, and a spike that is left out."""
    ordered = sorted(values)
    usual = ordered[int(0.99 * (len(ordered) - 1))]
    spike = ordered[-1] if len(ordered) > 100 and ordered[-1] > OFF_CHART * usual > 0 else None
    top = 1.5 * usual if spike is not None else ordered[-1]
    return min([ordered[0], *marks]), max([top, *marks]), spike


def _widen(low: float, high: float) -> tuple[float, float]:
    """A margin above and below; zero is kept as the floor where values come near it."""
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    margin = 0.06 * (high - low)
    floor = 0.0 if 0 <= low < 0.25 * high else low - margin
    return floor, high + margin


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """Four digits at most: 2.718, 11.2k, 3e-4, 0."""
    if abs(value) >= 1000:
        return short(value)
    if value and abs(value) < 0.001:
        return f'{value:.3g}'.replace('e-0', 'e-')
    return f'{value:.4g}'


def _grid(frame: _Frame, marks: Sequence[tuple[str, float]]) -> str:
    across = [
        f'<span class="x" style="left:{100 * frame.across(x):.2f}%">{number(x)}</span>'
        for x in ticks(frame.left, frame.right)
        if x == int(x)
    ]
    down = [
        f'<i style="top:{100 * frame.down(y):.2f}%"></i>'
        f'<span class="y" style="top:{100 * frame.down(y):.2f}%">{number(y)}</span>'
        for y in ticks(frame.bottom, frame.top)
    ]
    lines = [
        f'<span class="mark" style="top:{100 * frame.down(y):.2f}%">{escape(name)} {number(y)}</span>'
        for name, y in marks
    ]
    return f'<div class="axes" aria-hidden="true">{"".join([*down, *across, *lines])}</div>'


def _path(series: Series, frame: _Frame) -> str:
    points = thin(series.points)
    places = [f'{WIDTH * frame.across(x):.1f} {HEIGHT * frame.down(y):.1f}' for x, y in points]
    if series.look == 'dots':  # a line of no length with round ends stays round in a stretched drawing
        places = [f'M{place}h0' for place in places]
        joined = ''.join(places)
        thread = 'M' + 'L'.join(place[1:-2] for place in places)
        return _stroke('thread', series, thread) + _stroke('dots', series, joined)
    return _stroke(series.look, series, 'M' + 'L'.join(places))


def _stroke(look: str, series: Series, path: str) -> str:
    return f'<path class="{look}" style="stroke:var(--color-{series.color})" d="{path}"/>'


def thin(points: Sequence[Point]) -> list[Point]:
    """The same outline in few points: the lowest and the highest of each of BUCKETS parts, in order."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept: list[Point] = []
    for bucket in _parts(points, BUCKETS):
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """The median of each hundredth of the points, at its middle: no lag, and a spike leaves no trace."""
    parts = _parts(_finite(points), SMOOTH_PARTS)
    return [(part[len(part) // 2][0], statistics.median(y for _, y in part)) for part in parts]


def _parts(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    edges = [i * len(points) // count for i in range(count + 1)]
    return [points[low:high] for low, high in itertools.pairwise(edges) if high > low]


def _legend(series: Sequence[Series]) -> str:
    named = [one for one in series if one.look != 'faint']
    items = []
    for one in named:
        name = escape(one.name) if len(named) > 1 else 'latest'
        swatch = f'<i style="background:var(--color-{one.color})"></i>'
        items.append(f'<li>{swatch}{name} <b>{number(one.points[-1][1])}</b></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _spoken(title: str, unit: str, series: Sequence[Series], marks: Sequence[tuple[str, float]]) -> str:
    """What a screen reader says instead of the picture."""
    said = [
        f'{one.name} from {number(one.points[0][1])} at step {one.points[0][0]:,.0f} '
        f'to {number(one.points[-1][1])} at step {one.points[-1][0]:,.0f}'
        for one in series
        if one.look != 'faint'
    ]
    said += [f'{name} {number(y)}' for name, y in marks]
    return f'{title}, {unit}: {"; ".join(said)}'


def _data(series: Sequence[Series], frame: _Frame) -> str:
    """What the read-out shows: the drawn points, six digits each."""
    lines = [
        {
            'name': one.name,
            'color': one.color,
            'points': [[x, float(f'{y:.6g}')] for x, y in thin(one.points)],
        }
        for one in series
        if one.look != 'faint'
    ]
    return json.dumps({'left': frame.left, 'right': frame.right, 'lines': lines}).replace('<', '\\u003c')

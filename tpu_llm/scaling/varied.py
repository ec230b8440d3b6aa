"""In which settings a sweep's runs differ, and what each of those does to a metric."""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tpu_llm.scaling import drawn, table
from tpu_llm.scaling.figures import FLOPS, axis, charts, colors, drawing, figure, is_number, plotly, spreads, words
from tpu_llm.train.chart import number
from tpu_llm.train.page import section

Row = dict[str, Any]

MOST_GROUPS = 12  # that are told by colour
_MOST_SETTINGS = 9


def read_rows(path: epath.Path) -> list[Row]:
    """Of a CSV file; cells as numbers, truths, text, or None where empty or not finite."""
    lines = csv.DictReader(io.StringIO(path.read_text(), newline=''))
    return [{name: _value(text) for name, text in line.items()} for line in lines]


def _value(text: str) -> Any:
    if text in ('True', 'False'):
        return text == 'True'
    try:
        value = float(text)
    except ValueError:
        return text or None
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def settings(rows: Sequence[Row]) -> dict[str, str]:
    """The columns in which the sweep varies, and what to call each: labels, then leaves of the configs.

    A column that follows from one before it (heads from the width) is no setting of its own.
    """
    labels = [name for name in rows[0] if name not in table.COLUMNS and '.' not in name]
    leaves = [name for name in rows[0] if name.startswith('config.')]
    kept: list[str] = []
    for name in [*labels, *leaves]:
        values = {row[name] for row in rows}
        named = len(values) == len(rows) > 2 and not all(map(is_number, values))
        if len(values) > 1 and not named and not any(_follows(rows, name, other) for other in kept):
            kept.append(name)
    return {name: name.removeprefix('config.') for name in kept}


def _follows(rows: Sequence[Row], name: str, other: str) -> bool:
    """Whether `other`, which several runs share, says what `name` is."""
    pairs = {(row[other], row[name]) for row in rows}
    count = len({row[other] for row in rows})
    return len(pairs) == count < len(rows)


def distinct(rows: Sequence[Row], name: str) -> list[Any]:
    """In order: numbers first, then words, and last what some runs do not have."""
    return sorted({row[name] for row in rows}, key=lambda value: (value is None, not is_number(value), _key(value)))


def _key(value: Any) -> Any:
    return value if is_number(value) else str(value)


def label(value: Any, name: str = '') -> str:
    if value is None:
        return '–'
    if name in FLOPS and is_number(value):
        return f'{value:.3g}'
    return number(value) if is_number(value) else str(value)


def best_of(rows: Sequence[Row], metric: str, *, highest: bool) -> Row | None:
    scored = [row for row in rows if is_number(row.get(metric)) and row.get('status', 'finished') == 'finished']
    sign = -1 if highest else 1
    return min(scored, key=lambda row: sign * row[metric], default=None)


def called(metric: str) -> str:
    return metric.rpartition('.')[2].replace('_', ' ')


# ----------------------------------------------------------------------------------------------- what settings do


def settings_section(rows: Sequence[Row], found: Mapping[str, str], metric: str, *, highest: bool) -> str:
    """The metric over each setting; nothing where none varies or no run has the metric."""
    scored = [row for row in rows if is_number(row.get(metric)) and row.get('status', 'finished') == 'finished']
    best = best_of(rows, metric, highest=highest)
    shown = [name for name in found if len(distinct(scored, name)) > 1][:_MOST_SETTINGS]
    if best is None or not shown:
        return ''
    look = {1: 'whole', 2: ''}.get(len(shown), 'third' if len(shown) % 2 or len(shown) > 4 else '')
    figures = [
        figure(found[name], _beside(scored, found, name), _over(scored, found, name, metric, best), look=look)
        for name in shown
    ]
    lines = [f'A ring is round the {"highest" if highest else "lowest"}, {best["name"]}.']
    if without := [row['name'] for row in rows if row not in scored]:
        lines.append(f'Without a value, or not finished: {", ".join(without)}.')
    if rest := [found[name] for name in found if name not in shown]:
        lines.append(f'What varies, too: {", ".join(rest)}.')
    title = f'{called(metric)[0].upper()}{called(metric)[1:]} by setting'
    return section(title, charts(figures) + ''.join(map(drawn.note, lines)))


def _second(rows: Sequence[Row], found: Mapping[str, str], name: str) -> str:
    """The setting by which the points over `name` are coloured; '' where there is none of few values."""
    fits = (each for each in _shared(rows, found) if each != name and len(distinct(rows, each)) <= MOST_GROUPS)
    return max(fits, key=lambda each: len(distinct(rows, each)), default='')


def _shared(rows: Sequence[Row], found: Mapping[str, str]) -> list[str]:
    """Settings of which runs have the same value."""
    return [name for name in found if 1 < len(distinct(rows, name)) < len(rows)]


def _beside(rows: Sequence[Row], found: Mapping[str, str], name: str) -> str:
    second = _second(rows, found, name)
    return f'colour: {found[second]}' if second else ''


def _over(rows: Sequence[Row], found: Mapping[str, str], name: str, metric: str, best: Row) -> Any:
    """Points, joined where runs differ in this setting alone, and in what each has of its own."""
    go = plotly()
    second = _second(rows, found, name)
    values = distinct(rows, name)
    numeric = all(map(is_number, values))
    groups = distinct(rows, second) if second else [None]
    traces = []
    for value, color in zip(groups, colors(groups), strict=True):
        own = [row for row in rows if not second or row[second] == value]
        for line in _lines(own, [each for each in _shared(rows, found) if each != name]):
            line.sort(key=lambda row: values.index(row[name]))
            alike = len({row[name] for row in line}) == len(line)
            traces.append(
                go.Scatter(
                    x=[row[name] if numeric else label(row[name]) for row in line],
                    y=[row[metric] for row in line],
                    mode='lines+markers' if numeric and alike and len(line) > 1 else 'markers',
                    name=words(label(value, second)) if second else '',
                    legendgroup=words(label(value, second)) if second else '',
                    line={'color': color, 'width': 1.5},
                    marker={'color': color, 'size': 7},
                    text=[words(row['name']) for row in line],
                    hovertemplate='<b>%{text}</b><br>%{y:.5g}<extra></extra>',
                )
            )
    traces.append(
        go.Scatter(
            x=[best[name] if numeric else label(best[name])],
            y=[best[metric]],
            mode='markers',
            marker={'symbol': 'circle-open', 'size': 15, 'color': 'var(--ink)', 'line': {'width': 1.5}},
            hoverinfo='skip',
        )
    )
    across = axis('', values, exponentformat='power' if name in FLOPS else 'B')
    if numeric and _apart(values):
        across |= {'tickvals': values, 'ticktext': [label(value, name) for value in values]}
    if not numeric:
        across |= {'categoryarray': [label(value) for value in values]}
    scores = [row[metric] for row in rows]
    return drawing(traces, across, axis(type='log') if min(scores) > 0 and max(scores) > 10 * min(scores) else axis())


def _apart(values: Sequence[float]) -> bool:
    """Whether all can be labelled."""
    places = [math.log(value) for value in values] if spreads(values) else values
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return len(values) <= 7 and min(gaps) >= 0.1 * (places[-1] - places[0])


def _lines(rows: Sequence[Row], others: Sequence[str]) -> list[list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[other] for other in others), []).append(row)
    return list(found.values())

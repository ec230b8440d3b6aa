"""A scaling law as figures and tables of a page: isoFLOP valleys, the law with its intervals, runs that it foretells.

The tables are those that the commands print.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as Printed

from tpu_llm.config import ConfigError
from tpu_llm.scaling import fit as fits
from tpu_llm.scaling import printed
from tpu_llm.scaling.allocate import Estimate, allocate
from tpu_llm.scaling.figures import axis, charts, drawing, figure, plotly, shade, words
from tpu_llm.scaling.fit import Fit
from tpu_llm.scaling.laws import Chinchilla
from tpu_llm.scaling.points import Points, Table
from tpu_llm.scaling.valleys import PowerLaw, Profiles, Valley, profiles
from tpu_llm.train.page import section, table

AHEAD = 10.0  # times the greatest budget: how far the law is drawn
_PLACES = 24  # of a curve


def law(runs: Table) -> str:
    """Sections of the valleys and of the law, or one line that says what they lack.

    Runs of more FLOPs than every valley are kept from the fit, and predicted.
    """
    try:
        valleys = profiles(runs.points)
    except ConfigError as error:
        return note(f'No isoFLOP valleys and no scaling law: {error}.')
    most = max(valley.runs.budget.max() for valley in valleys.valleys)
    held = runs.points.budget > most
    return _valleys(valleys) + _law(runs, valleys, runs.points.take(~held), runs.points.take(held))


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def html(shown: RenderableType) -> str:
    """Tables and lines that were made for a terminal."""
    if isinstance(shown, Group):
        return ''.join(html(each) for each in shown.renderables)
    if isinstance(shown, Printed):
        columns = [[escape(str(cell)) for cell in column.cells] for column in shown.columns]
        heads = [escape(str(column.header)) for column in shown.columns]
        return table(heads, list(zip(*columns, strict=True)))
    return f'<p class="note">{escape(str(shown))}</p>' if str(shown) else ''


# ---------------------------------------------------------------------------------------------------------- valleys


def _valleys(found: Profiles) -> str:
    figures = [
        figure(
            'Valleys',
            'loss over parameters; a parabola through the runs near the least loss, a diamond at its minimum',
            drawing(_parabolas(found.valleys), axis('parameters', type='log'), axis()),
            look='' if found.parameters else 'whole',
        )
    ]
    if found.parameters and found.tokens:
        usable = [valley for valley in found.valleys if not valley.problem]
        flops = [valley.flops for valley in usable]
        traces = [
            *_minima('parameters', 0, flops, [valley.parameters for valley in usable], found.parameters),
            *_minima('tokens', 1, flops, [valley.tokens for valley in usable], found.tokens),
        ]
        made = drawing(traces, axis('FLOPs', type='log'), axis(type='log'))
        figures.append(figure('Minima', 'over the budget; bars hold 95 % of the bootstraps', made))
    return section('IsoFLOP valleys', charts(figures) + f'<div class="panel">{html(printed.profiles(found))}</div>')


def _parabolas(valleys: Sequence[Valley]) -> Iterator[Any]:
    go = plotly()
    for i, valley in enumerate(valleys):
        color, name = shade(i, len(valleys)), f'{valley.flops:.3g} FLOPs'
        yield _dots(name, valley.runs, valley.runs.parameters, valley.runs.loss, color)
        if valley.problem:
            continue
        ends = [valley.near.parameters.min(), valley.near.parameters.max(), valley.parameters.value]
        sizes = np.geomspace(min(ends), max(ends), _PLACES)
        yield go.Scatter(
            x=sizes.tolist(),
            y=valley(sizes).tolist(),
            mode='lines',
            name=name,
            legendgroup=name,
            line={'color': color, 'width': 2},
            hoverinfo='skip',
        )
        yield go.Scatter(
            x=[valley.parameters.value],
            y=[valley.loss.value],
            error_x=_bar(valley.parameters.value, valley.parameters.low, valley.parameters.high, color),
            mode='markers',
            name=name,
            legendgroup=name,
            marker={'color': color, 'symbol': 'diamond', 'size': 11},
            hovertemplate=f'<b>minimum of {name}</b><br>{printed.told(valley.parameters)} parameters'
            '<br>loss %{y:.4f}<extra></extra>',
        )


def _minima(name: str, i: int, flops: list[float], found: Sequence[Any], power: PowerLaw) -> Iterator[Any]:
    go = plotly()
    color = f'var(--hue-{i})'
    low, high = [each.low for each in found], [each.high for each in found]
    values = [each.value for each in found]
    yield go.Scatter(
        x=flops,
        y=values,
        error_y=_bar(values, low, high, color),
        mode='markers',
        name=name,
        legendgroup=name,
        marker={'color': color, 'symbol': ('diamond', 'circle')[i], 'size': 10},
        text=[printed.told(each) for each in found],
        hovertemplate=f'<b>{name}</b> %{{text}}<br>%{{x:.3g}} FLOPs<extra></extra>',
    )
    yield go.Scatter(
        x=flops,
        y=[power(each) for each in flops],
        mode='lines',
        name=name,
        legendgroup=name,
        line={'color': color, 'width': 2},
        hovertemplate=f'<b>{name} as C^{printed.told(power.power)}</b><extra></extra>',
    )


def _bar(values: Any, low: Any, high: Any, color: str) -> dict[str, Any]:
    """From each value to both ends of its interval; nothing where there is none."""
    middle, ends = np.atleast_1d(values), (np.atleast_1d(low), np.atleast_1d(high))
    below, above = np.nan_to_num(middle - ends[0]), np.nan_to_num(ends[1] - middle)
    bar = {'type': 'data', 'symmetric': False, 'array': above.tolist(), 'arrayminus': below.tolist()}
    return bar | {'color': color, 'thickness': 1.5, 'width': 4}


def _dots(group: str, runs: Points, x: np.ndarray, y: np.ndarray, color: str, symbol: str = 'circle') -> Any:
    about = [
        f'<b>{words(name)}</b><br>{printed.short(size)} parameters, {printed.short(tokens)} tokens<br>loss {loss:.4f}'
        for name, size, tokens, loss in zip(runs.names, runs.parameters, runs.tokens, runs.loss, strict=True)
    ]
    return plotly().Scatter(
        x=x.tolist(),
        y=y.tolist(),
        mode='markers',
        name=group,
        legendgroup=group,
        marker={'color': color, 'symbol': symbol, 'size': 13 if symbol == 'star' else 8},
        text=about,
        hovertemplate='%{text}<extra></extra>',
    )


# -------------------------------------------------------------------------------------------------------------- law


def _law(runs: Table, valleys: Profiles, fitted: Points, held: Points) -> str:
    try:
        found = fits.fit(Chinchilla(), fitted)
    except ConfigError as error:
        return section('Scaling law', note(f'No law is fitted: {error}.'))
    cost = float(np.median(fitted.flops / fitted.parameters / fitted.tokens))
    budgets = [valley.flops for valley in valleys.valleys]
    ends = min(budgets), AHEAD * max(budgets)
    measured = np.concatenate([fitted.loss, held.loss])
    # Intervals of few runs are wide: the runs set the scale.
    frontier = [allocate(found, each, cost).loss for each in np.geomspace(*ends, _PLACES)]
    both = np.concatenate([measured, found.predict(fitted), found.predict(held)])
    figures = [
        figure(
            'Least loss',
            'over FLOPs: what the law puts at the best size, the band 95 % of the bootstraps',
            drawing(
                [*_frontier(np.geomspace(*ends, _PLACES).tolist(), frontier), *_measured(valleys, held)],
                axis('FLOPs', type='log'),
                axis(range=_around(np.array([*measured, *(each.value for each in frontier)]))),
            ),
        ),
        figure(
            'Law and runs',
            'loss as measured over loss by the law; bars hold 95 % of the bootstraps',
            drawing(
                [*_diagonal(both), *_agreement(found, valleys, held)],
                axis('loss by the law', range=_around(both)),
                axis(range=_around(both)),
            ),
        ),
    ]
    tables = html(printed.fit(found, runs, fitted, held, [*budgets, ends[1]], cost))
    return section('Scaling law', charts(figures) + f'<div class="panel">{tables}</div>')


def _around(values: np.ndarray) -> list[float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.06 * (high - low)
    return [low - margin, high + margin]


def _frontier(flops: Sequence[float], best: Sequence[Estimate]) -> Iterator[Any]:
    go = plotly()
    if not np.isfinite([each.value for each in best]).all():
        return  # a fit of which an exponent is below 0 has no best size
    shown = [(x, each) for x, each in zip(flops, best, strict=True) if np.isfinite(each.low + each.high)]
    yield go.Scatter(
        x=[x for x, _ in shown] + [x for x, _ in reversed(shown)],
        y=[each.low for _, each in shown] + [each.high for _, each in reversed(shown)],
        mode='lines',
        line={'width': 0},
        fill='toself',
        fillcolor='var(--hue-0)',
        opacity=0.18,
        name='the law',
        legendgroup='the law',
        hoverinfo='skip',
    )
    yield go.Scatter(
        x=list(flops),
        y=[each.value for each in best],
        mode='lines',
        name='the law',
        legendgroup='the law',
        line={'color': 'var(--hue-0)', 'width': 2},
        text=[f'{each.value:.4f} ({each.low:.4f} to {each.high:.4f})' for each in best],
        hovertemplate='<b>least loss by the law</b><br>%{x:.3g} FLOPs<br>%{text}<extra></extra>',
    )


def _measured(valleys: Profiles, held: Points) -> Iterator[Any]:
    for i, valley in enumerate(valleys.valleys):
        color = shade(i, len(valleys.valleys))
        yield _dots(f'{valley.flops:.3g} FLOPs', valley.runs, valley.runs.flops, valley.runs.loss, color)
    if len(held):
        yield _dots('held out', held, held.flops, held.loss, 'var(--ink)', 'star')


def _diagonal(values: np.ndarray) -> Iterator[Any]:
    look = {'color': 'var(--soft)', 'width': 1}
    yield plotly().Scatter(x=_around(values), y=_around(values), mode='lines', line=look, hoverinfo='skip')


def _agreement(found: Fit, valleys: Profiles, held: Points) -> Iterator[Any]:
    groups = [(f'{valley.flops:.3g} FLOPs', valley.runs) for valley in valleys.valleys]
    groups += [('held out', held)] if len(held) else []
    for i, (name, runs) in enumerate(groups):
        is_held = runs is held
        color = 'var(--ink)' if is_held else shade(i, len(valleys.valleys))
        predicted = found.predict(runs)
        dots = _dots(name, runs, predicted, runs.loss, color, 'star' if is_held else 'circle')
        low, high = found.interval(runs)
        dots.error_x = _bar(predicted, low, high, color)
        dots.text = [
            f'{text}, by the law {value:.4f}' for text, value in zip(dots.text, predicted.tolist(), strict=True)
        ]
        yield dots

"""`report.html` of a sweep: all its runs on one page, from what its folder holds, at its end or before.

It shows curves, what the settings that vary do to a metric, isoFLOP valleys and a scaling law where the runs form
them, and the table of runs. The page needs no network.
"""

import collections
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError, nearest
from tpu_llm.scaling import drawn, points, record, table
from tpu_llm.scaling.figures import (
    FLOPS,
    axis,
    box,
    charts,
    choice,
    colors,
    drawing,
    drawn_page,
    figure,
    hue,
    is_number,
    plotly,
    spreads,
    words,
)
from tpu_llm.scaling.printed import short
from tpu_llm.scaling.sweep import RUNS
from tpu_llm.scaling.varied import (
    MOST_GROUPS,
    Row,
    best_of,
    called,
    distinct,
    label,
    read_rows,
    settings,
    settings_section,
)
from tpu_llm.train import metrics
from tpu_llm.train import page as pages
from tpu_llm.train.chart import number, smooth, thin
from tpu_llm.train.page import card, section
from tpu_llm.train.progress import clock

FILE = 'report.html'

_FIRST = ('heldout_loss', 'loss', 'heldout_reward', 'reward')  # metrics that one asks for first
_LEFT_OUT = {'step', 'tokens', 'skipped', 'gzip_bits_per_byte'}
_SMOOTHED_FROM = 100  # points of a curve
_DASHES = ('solid', 'dash', 'dot', 'dashdot')
_COUNTS = ('parameters', 'tokens', 'flops')


class Track(NamedTuple):
    """A metric of one run on its way."""

    steps: list[float]
    tokens: list[float]
    values: list[float]


def write_report(workdir: epath.PathLike, metric: str = 'loss', *, highest: bool = False) -> epath.Path:
    """Writes the page and gives its path; `metric` is a column of the table, of which less is better unless `highest`.

    Raises ConfigError where the folder holds no sweep, none of its runs has finished, or plotly is missing.
    """
    plotly()
    workdir = epath.Path(workdir)
    runs = record.read(workdir)['runs']
    rows = read_rows(workdir / table.CSV)
    counts = collections.Counter(row['status'] for row in rows)
    if not counts['finished']:
        there = ', '.join(f'{count} {status}' for status, count in counts.items())
        raise ConfigError(f'no run of {workdir} has finished ({there}), so there is nothing to compare yet')
    check_metric(rows, metric)
    found = settings(rows)
    tracks = {name: _tracks(workdir / RUNS / name, about['config']) for name, about in runs.items()}
    parts = [
        curves_section(rows, found, tracks),
        settings_section(rows, found, metric, highest=highest),
        _law(rows, workdir / table.CSV),
        runs_section(rows, found, metric),
    ]
    header = f'<h1>{escape(workdir.name)}</h1>\n<p>{escape(str(workdir))}</p>\n{cards(rows, metric, highest=highest)}'
    metrics.replace_text(workdir / FILE, drawn_page(workdir.name, header, '\n'.join(filter(None, parts))))
    return workdir / FILE


def check_metric(rows: Sequence[Row], metric: str) -> None:
    there = [name for name in rows[0] if any(is_number(row[name]) for row in rows)]
    if metric not in there and metric != 'loss':
        raise ConfigError(f'metric: the table has no numbers in a column {metric!r}{nearest(metric, there)}')


# ------------------------------------------------------------------------------------------------------------ cards


def cards(rows: Sequence[Row], metric: str, *, highest: bool) -> str:
    counts = collections.Counter(row.get('status', 'finished') for row in rows)
    others = ', '.join(f'{count} {status}' for status, count in counts.items() if status != 'finished')
    made = [card('runs finished', f'{counts["finished"]}', others or 'all of them', 'bad' if counts['failed'] else '')]
    if best := best_of(rows, metric, highest=highest):
        made.append(card(f'{"highest" if highest else "lowest"} {called(metric)}', number(best[metric]), best['name']))
    if sizes := distinct([row for row in rows if row.get('parameters')], 'parameters'):
        many = f'{len(sizes)} sizes' if len(sizes) > 1 else f'{sizes[0]:,}'
        made.append(card('parameters', '–'.join(dict.fromkeys(map(short, (sizes[0], sizes[-1])))), many))
    if seen := sum(row.get('tokens') or 0 for row in rows):
        flops = sum(row.get('flops') or 0 for row in rows)
        made.append(card('tokens', short(seen), f'{flops:.3g} FLOPs, all runs' if flops else 'all runs'))
    if wall := sum(row.get('seconds') or 0 for row in rows):
        useful = sum((row.get('seconds') or 0) * (row.get('goodput') or 0) for row in rows)
        made.append(card('time', clock(wall), f'{useful / wall:.0%} of it training steps' if useful else 'all runs'))
    return f'<dl class="cards">{"".join(made)}</dl>'


# ----------------------------------------------------------------------------------------------------------- curves


def _tracks(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, Track]:
    """Every metric that a run logged, by name; those of a stage are `STAGE: metric`."""
    found: dict[str, Track] = {}
    for stage, place in _places(folder, config):
        path = place / 'metrics.jsonl'
        lines = metrics.read(path) if path.exists() else []
        seen = [(line['step'], line['tokens']) for line in lines if 'tokens' in line]
        names = dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value))
        for name in names:
            values = [(line['step'], line[name]) for line in lines if is_number(line.get(name))]
            shown = [(x, y) for x, y in values if math.isfinite(y)]
            if name not in _LEFT_OUT and shown:
                shown = smooth(shown) if len(shown) > _SMOOTHED_FROM and 'heldout' not in name else thin(shown)
                found[f'{stage}: {name}' if stage else name] = _track(shown, seen)
    return found


def _places(folder: epath.Path, config: Mapping[str, Any], stage: str = '') -> Iterator[tuple[str, epath.Path]]:
    """The workdirs in a run's folder: its own, or one a stage."""
    if 'stages' not in config:
        yield stage, folder
    for name, below in config.get('stages', {}).items():
        yield from _places(folder / name, below, f'{stage}/{name}' if stage else name)


def _track(shown: Sequence[tuple[float, float]], seen: Sequence[tuple[float, float]]) -> Track:
    steps, values = [x for x, _ in shown], [float(f'{y:.6g}') for _, y in shown]
    at, counted = [0, *(x for x, _ in seen)], [0, *(y for _, y in seen)]
    tokens = np.interp(steps, at, counted).round().tolist() if seen else []
    return Track(steps, tokens, values)


def curves_section(rows: Sequence[Row], found: Mapping[str, str], tracks: Mapping[str, Mapping[str, Track]]) -> str:
    """Every curve of every run in one figure; nothing where none was logged."""
    rows = [row for row in rows if tracks.get(row['name'])]
    there = dict.fromkeys(name for row in rows for name in tracks[row['name']])
    curved = {name for row in rows for name, track in tracks[row['name']].items() if len(track.steps) > 1}
    names = [name for name in there if name in curved or name.rpartition(' ')[2] in _FIRST]
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return section('Curves', charts([_curves(rows, found, tracks, names, curved)])) if names else ''


def _curves(
    rows: Sequence[Row],
    found: Mapping[str, str],
    tracks: Mapping[str, Mapping[str, Track]],
    names: Sequence[str],
    curved: Collection[str],
) -> str:
    go = plotly()
    longest = [max(track.steps[-1] for track in tracks[row['name']].values()) for row in rows]
    by_flops = [row['flops'] / row['tokens'] if row.get('flops') and row.get('tokens') else 0 for row in rows]
    staged = any(': ' in name for name in names)
    counted = all(tracks[row['name']][name].tokens for row in rows for name in tracks[row['name']])
    axes = ['steps', *(['tokens'] if counted else []), *(['FLOPs'] if counted and all(by_flops) and not staged else [])]
    uneven = spreads(longest)
    first = next((name for name in names if name in curved), names[0])
    groups = {found[name]: _groups(rows, name) for name in found if len(distinct(rows, name)) <= MOST_GROUPS}
    groups['run'] = [[words(row['name']), hue(i), _DASHES[i // 7 % 4]] for i, row in enumerate(rows)]
    own = len(rows) <= MOST_GROUPS or len(groups) == 1
    picks = [
        choice('metric', 'metric', names, first),
        choice('axis', 'over', axes, axes[-1] if uneven else 'steps'),
        choice('color', 'colour', list(groups), 'run' if own else next(iter(groups))),
        box('logx', 'log x', uneven),
        box('logy', 'log y'),
    ]
    traces = [
        go.Scatter(
            name=words(row['name']),
            line={'width': 1.8},
            hovertemplate=f'<b>{words(row["name"])}</b><br>%{{y:.5g}} at %{{x:.4s}}<extra></extra>',
        )
        for row in rows
    ]
    return figure(
        'All runs',
        f'a curve of more than {_SMOOTHED_FROM} points by the median of each hundredth',
        drawing(traces, axis(' '), axis()),
        look='whole',
        picks=f'<div class="picks">{"".join(picks)}</div>',
        curves={
            'metrics': {name: [tracks[row['name']].get(name) for row in rows] for name in names},
            'flops': by_flops,
            'groups': groups,
        },
    )


def _groups(rows: Sequence[Row], name: str) -> list[list[str]]:
    """Of each run what the legend calls its value, and its colour and dash."""
    values = distinct(rows, name)
    by_value = dict(zip(values, colors(values), strict=True))
    return [[words(label(row[name], name)), by_value[row[name]], 'solid'] for row in rows]


# ---------------------------------------------------------------------------------------------------- law and table


def _law(rows: Sequence[Row], path: epath.Path) -> str:
    if not any(row['status'] == 'finished' and is_number(row['loss']) for row in rows):
        return ''
    try:
        return drawn.law(points.read(path))
    except ConfigError as error:
        return drawn.note(f'No scaling law: {error}.')


def runs_section(rows: Sequence[Row], found: Mapping[str, str], metric: str) -> str:
    """The table of all runs, sorted by a click on a column."""
    finals = [f'final.{name}' for name in ('heldout_loss', 'bits_per_byte', 'heldout_reward', 'heldout_accuracy')]
    spent = [name for name in rows[0] if name.startswith('ledger.') and any(row[name] for row in rows)]
    columns = dict.fromkeys(
        ['status', *found, *_COUNTS, 'steps', metric, *finals, 'tries', 'seconds', 'goodput', *spent]
    )
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    shown = [name for name in shown if not _repeats(rows, name, metric)]
    heads = ['run', *(escape(found.get(name) or _head(name)) for name in shown)]
    body = [[escape(str(row['name'])), *(_cell(row, name) for name in shown)] for row in rows]
    words_first = 1 + ('status' in shown)
    return section('Runs', f'<div class="panel runs">{pages.table(heads, body, words_first)}</div>')


def _repeats(rows: Sequence[Row], name: str, metric: str) -> bool:
    """Whether a last value is the metric once more."""
    return name.startswith('final.') and name != metric and all(row.get(name) == row.get(metric) for row in rows)


def _head(name: str) -> str:
    if name.startswith('ledger.'):
        return f'{name.removeprefix("ledger.")}, s'
    return {'flops': 'FLOPs', 'seconds': 'time'}.get(name) or called(name)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if name == 'status':
        reason = f'<small>{escape(str(row["reason"]))}</small>' if row.get('reason') else ''
        return f'{escape(str(value))}{reason}'
    if not is_number(value):
        return '' if value is None else escape(str(value))
    if name == 'seconds':
        text = clock(value)
    elif name == 'goodput':
        text = f'{value:.0%}'
    elif name.startswith('ledger.'):
        text = f'{value:,.1f}'
    elif name.startswith('final.') or name == 'loss':
        text = f'{value:.4f}' if abs(value) < 1000 else number(value)
    elif name == 'flops' or name in FLOPS:
        text = f'{value:.3g}'
    elif name in _COUNTS:
        text = short(value)
    else:
        text = f'{value:,}' if isinstance(value, int) and value < 1e6 else number(value)
    return f'<data value="{value}">{text}</data>'

"""`report.html`: a run on one page, made from what lies in its workdir.

It reads `metrics.jsonl`, which every run has, and where they are there `ledger.jsonl`, `samples.jsonl`
(lines of step, prompt, text), `config.json` and `summary.json` (the final numbers: bits_per_byte and
heldout_loss of all held-out text, gzip_bits_per_byte, tokens, parameters). What a run did not do is left
out of the page. The page needs no network.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from tpu_llm.config import flatten
from tpu_llm.train import ledger
from tpu_llm.train.chart import Series, chart, heat_map, number, smooth
from tpu_llm.train.metrics import read, replace_text
from tpu_llm.train.page import card, page, section, table
from tpu_llm.train.progress import clock, short

FILE = 'report.html'
SMOOTHED_FROM = 100  # points, below which a line is drawn as it is

Records = list[dict[str, Any]]


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes the page and gives its path. Raises ValueError where the workdir holds no metrics."""
    workdir = epath.Path(workdir)
    if not (workdir / 'metrics.jsonl').exists():
        raise ValueError(f'{workdir / "metrics.jsonl"} does not exist: is {workdir} the workdir of a run?')
    metrics = read(workdir / 'metrics.jsonl')
    starts = read(workdir / ledger.FILE) if (workdir / ledger.FILE).exists() else []
    samples = read(workdir / 'samples.jsonl') if (workdir / 'samples.jsonl').exists() else []
    config, summary = _json(workdir / 'config.json'), _json(workdir / 'summary.json')
    sections = [
        _charts(metrics, summary),
        _further(metrics),
        _experts(metrics, config),
        _samples(samples),
        _time(starts),
        _evaluations(metrics),
        _config(config),
    ]
    header = f'<h1>{escape(workdir.name)}</h1>\n{_where(workdir, starts)}\n{_cards(metrics, summary, starts)}'
    text = page(workdir.name, header, '\n'.join(filter(None, sections)), 'Written by tpu_llm.')
    replace_text(workdir / FILE, text)
    return workdir / FILE


def _json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _points(metrics: Records, name: str) -> list[tuple[float, float]]:
    return [(record['step'], record[name]) for record in metrics if name in record]


def _values(metrics: Records, name: str) -> list[float]:
    return [value for _, value in _points(metrics, name)]


# ------------------------------------------------------------------------------------------- headline numbers


def _unit(metrics: Records) -> str:
    """Of the loss: objectives that predict tokens tell `nll`."""
    return 'nats per token' if any('nll' in record for record in metrics) else ''


def _where(workdir: epath.Path, starts: Records) -> str:
    began = f', begun {starts[0]["start"][:16].replace("T", " ")} UTC on {starts[0]["host"]}' if starts else ''
    return f'<p>{escape(str(workdir) + began)}</p>'


def _cards(metrics: Records, summary: Mapping[str, Any], starts: Records) -> str:
    """The numbers that one asks for first, as a description list."""
    cards = []
    if 'bits_per_byte' in summary:
        cards.append(_bits_card(summary['bits_per_byte'], summary.get('gzip_bits_per_byte')))
    if heldout := [summary['heldout_loss']] if 'heldout_loss' in summary else _values(metrics, 'heldout_loss'):
        cards.append(card('held-out loss', number(heldout[-1]), _unit(metrics)))
    if losses := smooth(_points(metrics, 'loss')):
        note = ', '.join(filter(None, (_unit(metrics), 'end of the run')))
        cards.append(card('training loss', number(losses[-1][1]), note))
    if 'parameters' in summary:
        active = summary.get('active_parameters', summary['parameters'])
        note = f'{short(active)} active' if active < summary['parameters'] else f'{active:,}'
        cards.append(card('parameters', short(summary['parameters']), note))
    if 'tokens' in summary:
        cards.append(card('tokens', short(summary['tokens']), f'{metrics[-1]["step"]:,} steps'))
    if speeds := _values(metrics, 'tokens_per_second'):
        cards.append(card('tokens per second', short(statistics.median(speeds)), 'median'))
    if starts:
        spent = ledger.summarize(starts)
        cards.append(card('time', clock(spent.wall), f'{spent.goodput:.0%} of it training steps'))
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _bits_card(bits: float, gzip: float | None) -> str:
    if gzip is None:
        return card('bits per byte', f'{bits:.3f}', 'held-out text')
    fewer = bits < gzip
    verdict = f'{abs(1 - bits / gzip):.0%} {"below" if fewer else "above"} gzip -9 ({gzip:.3f})'
    return card('bits per byte', f'{bits:.3f}', verdict, 'good' if fewer else '')


# --------------------------------------------------------------------------------------------------- sections


def _charts(metrics: Records, summary: Mapping[str, Any]) -> str:
    gzip = [('gzip -9', summary['gzip_bits_per_byte'])] if 'gzip_bits_per_byte' in summary else []
    heldout = Series(name='held-out', points=_points(metrics, 'heldout_loss'), look='dots', color=2)
    bits = Series(name='held-out', points=_points(metrics, 'bits_per_byte'), look='dots', color=2)
    text = 'the held-out text scored on the way' if _points(metrics, 'bits_per_byte_all') else 'held-out text'
    wide = [
        chart('Loss', _unit(metrics), [*_line('train', _points(metrics, 'loss'), 1), heldout]),
        chart('Bits per byte', text, [bits], gzip),
    ]
    narrow = [
        chart(title, unit, _line(title.lower(), _points(metrics, name), color))
        for title, unit, name, color in (
            ('Learning rate', 'per step', 'learning_rate', 4),
            ('Gradient norm', 'before clipping', 'grad_norm', 3),
            ('Tokens per second', 'all devices', 'tokens_per_second', 1),
            ('Model FLOPs utilization', 'share of the peak', 'mfu', 5),
        )
    ]
    narrow = [figure.replace('class="chart"', 'class="chart third"', 1) for figure in narrow]
    return section('Training', f'<div class="charts">{"".join([*wide, *narrow])}</div>')


# What has a chart, a table or a section of its own, or needs none.
_SHOWN = {'step', 'loss', 'learning_rate', 'grad_norm', 'tokens', 'tokens_per_second', 'mfu', 'nll', 'skipped'}
_SHOWN |= {'loss', 'nll', 'bits_per_byte', 'bits_per_byte_all', 'perplexity', 'balance', 'routing_alarm'}


def _further(metrics: Records) -> str:
    """A chart of each further metric: rewards, divergences, accuracies, whatever the objective and its data tell."""
    names = dict.fromkeys(
        name.removeprefix('heldout_')
        for record in metrics
        for name, value in record.items()
        if isinstance(value, (int, float)) and not name.startswith('expert_')
    )
    figures = []
    for name in names:
        trained, heldout = _points(metrics, name), _points(metrics, f'heldout_{name}')
        if name in _SHOWN or len(trained) + len(heldout) < 2:
            continue
        title = ' '.join('KL' if word == 'kl' else word for word in name.split('_'))
        series = _line('train', trained, 1) if trained else []
        series += [Series(name='held-out', points=heldout, look='dots', color=2)] if heldout else []
        figures.append(chart(title[0].upper() + title[1:], '', series))
    thirds = [figure.replace('class="chart"', 'class="chart third"', 1) for figure in figures]
    return section('What else was measured', f'<div class="charts">{"".join(thirds)}</div>') if thirds else ''


def _line(name: str, points: Sequence[tuple[float, float]], color: int) -> list[Series]:
    """One line; where there are many points, their average in front of the points themselves."""
    if len(points) < SMOOTHED_FROM or name == 'learning rate':
        return [Series(name=name, points=points, color=color)]
    return [
        Series(name=name, points=points, look='faint', color=color),
        Series(name=name, points=smooth(points), color=color),
    ]


def _experts(metrics: Records, config: Mapping[str, Any]) -> str:
    """The load of every expert at the end of the run, and how many of them the worst layer used on the way."""
    loads = [record['expert_load'] for record in metrics if math.isfinite(record.get('experts_used', math.nan))]
    if not loads:
        return ''
    count = len(loads[-1][0])
    moe = config['model']['moe'] if config else {'first_dense': 0, 'every': 1}
    names = [f'layer {moe["first_dense"] + (i + 1) * moe["every"] - 1}' for i in range(len(loads[-1]))]
    shares = [[count * share for share in load] for load in loads[-1]]
    used = Series(name='used', points=_points(metrics, 'experts_used'), color=2)
    figures = [
        heat_map('Load per expert', 'last step; 1 is an even share, 3 or more full colour', shares, names, 3.0),
        chart('Experts in use', 'effective number, worst layer', [used], [('all', count), ('alarm', count / 2)]),
    ]
    return section('Experts', f'<div class="charts">{"".join(figures)}</div>')


def _samples(samples: Records) -> str:
    """The latest samples first: the prompt in colour, then what the model wrote."""
    if not samples:
        return ''
    samples = sorted(samples, key=lambda sample: -sample['step'])
    latest = [sample for sample in samples if sample['step'] == samples[0]['step']]
    earlier = samples[len(latest) :]
    fold = f'<details><summary>Earlier samples ({len(earlier)})</summary>{_written(earlier)}</details>'
    return section('Samples', _written(latest) + (fold if earlier else ''))


def _written(samples: Records) -> str:
    figures = [
        f'<figure class="panel sample"><figcaption>step {sample["step"]:,}</figcaption>'
        f'<pre><mark>{escape(sample["prompt"])}</mark>{escape(sample["text"])}</pre></figure>'
        for sample in samples
    ]
    return f'<div class="columns">{"".join(figures)}</div>'


def _time(starts: Records) -> str:
    """A bar and a table of the time ledger, over all starts."""
    if not starts:
        return ''
    summary = ledger.summarize(starts)
    spent = [
        (name, seconds, seconds / (summary.wall or 1.0), color)
        for color, (name, seconds) in enumerate(summary.seconds.items(), 1)
        if seconds
    ]
    bar = ''.join(f'<span style="flex:{share:.5f};background:var(--color-{c})"></span>' for *_, share, c in spent)
    rows = [
        [
            f'<i class="swatch" style="background:var(--color-{c})"></i>{name}',
            f'{seconds:,.1f}',
            f'{share:.1%}',
        ]
        for name, seconds, share, c in spent
    ]
    rows.append(['wall', f'{summary.wall:,.1f}', '100.0%'])
    note = (
        f'Goodput {summary.goodput:.1%}: the share of wall time that went into steps which count. '
        f'Starts: {summary.starts:,}; steps done twice: {summary.lost_steps:,}.'
    )
    body = f'<div class="bar" aria-hidden="true">{bar}</div>' + table(['phase', 'seconds', 'share'], rows)
    return section('Time', f'<div class="panel">{body}<p class="note">{note}</p></div>')


def _evaluations(metrics: Records) -> str:
    """The evaluations as numbers: what the chart says, for those who cannot see it or want to copy it."""
    columns = {
        'heldout_loss': 'held-out loss',
        'bits_per_byte': 'bits per byte',
        'heldout_loss_all': 'held-out loss, all documents',
        'bits_per_byte_all': 'bits per byte, all documents',
    }
    names = [name for name in columns if _points(metrics, name)]
    rows = [
        [f'{record["step"]:,}', *(f'{record[name]:.4f}' if name in record else '' for name in names)]
        for record in metrics
        if any(name in record for name in names)
    ]
    numbers = table(['step', *(columns[name] for name in names)], rows)
    fold = f'<details><summary>Evaluations as numbers ({len(rows)})</summary>{numbers}</details>'
    return f'<div class="panel" style="margin-top:16px">{fold}</div>' if rows else ''


def _config(config: Mapping[str, Any]) -> str:
    """Every leaf of the resolved config, with a field to filter them by."""
    leaves = flatten(config)
    rows = ''.join(
        f'<tr><td>{escape(path)}</td><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>'
        for path, value in leaves.items()
    )
    fields = (
        '<input type="search" data-filters="config" placeholder="filter" aria-label="filter the config">'
        f'<div class="scroll"><table class="config"><tbody id="config">{rows}</tbody></table></div>'
    )
    fold = f'<details><summary>All fields ({len(leaves)})</summary>{fields}</details>'
    return section('Config', f'<div class="panel">{fold}</div>') if leaves else ''

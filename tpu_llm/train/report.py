"""`report.html`: a run on one page, made from what lies in its workdir.

It reads `metrics.jsonl`, which every run has, and where they are there `ledger.jsonl`, `samples.jsonl`
(lines of step, prompt, text), `config.json` and `summary.json` (the final numbers: bits_per_byte,
gzip_bits_per_byte, tokens, parameters, seconds). What a run did not do is left out of the page. The page
needs no network.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from tpu_llm.config import flatten
from tpu_llm.train import ledger
from tpu_llm.train.chart import Series, chart, number, smooth
from tpu_llm.train.metrics import read, replace_text
from tpu_llm.train.page import page
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


# ------------------------------------------------------------------------------------------- headline numbers


def _where(workdir: epath.Path, starts: Records) -> str:
    began = f', begun {starts[0]["start"][:16].replace("T", " ")} UTC on {starts[0]["host"]}' if starts else ''
    return f'<p>{escape(str(workdir) + began)}</p>'


def _cards(metrics: Records, summary: Mapping[str, Any], starts: Records) -> str:
    """The numbers that one asks for first, as a description list."""
    cards = []
    if 'bits_per_byte' in summary:
        cards.append(_bits_card(summary['bits_per_byte'], summary.get('gzip_bits_per_byte')))
    if heldout := _points(metrics, 'heldout_loss'):
        cards.append(_card('held-out loss', number(heldout[-1][1]), 'nats per token'))
    if losses := smooth(_points(metrics, 'loss')):
        cards.append(_card('training loss', number(losses[-1][1]), 'nats per token, end of the run'))
    if 'parameters' in summary:
        cards.append(_card('parameters', short(summary['parameters']), f'{summary["parameters"]:,}'))
    if 'tokens' in summary:
        cards.append(_card('tokens', short(summary['tokens']), f'{metrics[-1]["step"]:,} steps'))
    if speeds := [speed for _, speed in _points(metrics, 'tokens_per_second')]:
        cards.append(_card('tokens per second', short(statistics.median(speeds)), 'median'))
    if 'seconds' in summary:
        goodput = f'{ledger.summarize(starts).goodput:.0%} of it training steps' if starts else ''
        cards.append(_card('time', clock(summary['seconds']), goodput))
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _bits_card(bits: float, gzip: float | None) -> str:
    if gzip is None:
        return _card('bits per byte', f'{bits:.3f}', 'held-out text')
    fewer = bits < gzip
    verdict = f'{abs(1 - bits / gzip):.0%} {"below" if fewer else "above"} gzip -9 ({gzip:.3f})'
    return _card('bits per byte', f'{bits:.3f}', verdict, good=fewer)


def _card(name: str, value: str, note: str, good: bool = False) -> str:
    kind = ' class="good"' if good else ''
    small = f'<small{kind}>{escape(note)}</small>'
    return f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>'


# --------------------------------------------------------------------------------------------------- sections


def _charts(metrics: Records, summary: Mapping[str, Any]) -> str:
    gzip = [('gzip -9', summary['gzip_bits_per_byte'])] if 'gzip_bits_per_byte' in summary else []
    heldout = Series(name='held-out', points=_points(metrics, 'heldout_loss'), look='dots', color=2)
    bits = Series(name='held-out', points=_points(metrics, 'bits_per_byte'), look='dots', color=2)
    wide = [
        chart('Loss', 'nats per token', [*_line('train', _points(metrics, 'loss'), 1), heldout]),
        chart('Bits per byte', 'held-out text', [bits], gzip),
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
    return _section('Training', f'<div class="charts">{"".join([*wide, *narrow])}</div>')


def _line(name: str, points: Sequence[tuple[float, float]], color: int) -> list[Series]:
    """One line; where there are many points, their average in front of the points themselves."""
    if len(points) < SMOOTHED_FROM or name == 'learning rate':
        return [Series(name=name, points=points, color=color)]
    return [
        Series(name=name, points=points, look='faint', color=color),
        Series(name=name, points=smooth(points), color=color),
    ]


def _samples(samples: Records) -> str:
    """The latest samples first: the prompt in colour, then what the model wrote."""
    if not samples:
        return ''
    samples = sorted(samples, key=lambda sample: -sample['step'])
    latest = [sample for sample in samples if sample['step'] == samples[0]['step']]
    earlier = samples[len(latest) :]
    fold = f'<details><summary>Earlier samples ({len(earlier)})</summary>{_written(earlier)}</details>'
    return _section('Samples', _written(latest) + (fold if earlier else ''))


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
    body = f'<div class="bar" aria-hidden="true">{bar}</div>' + _table(['phase', 'seconds', 'share'], rows)
    return _section('Time', f'<div class="panel">{body}<p class="note">{note}</p></div>')


def _evaluations(metrics: Records) -> str:
    """The evaluations as numbers: what the chart says, for those who cannot see it or want to copy it."""
    names = ('heldout_loss', 'bits_per_byte')
    rows = [
        [f'{record["step"]:,}', *(f'{record[name]:.4f}' if name in record else '' for name in names)]
        for record in metrics
        if any(name in record for name in names)
    ]
    table = _table(['step', 'held-out loss', 'bits per byte'], rows)
    fold = f'<details><summary>Evaluations as numbers ({len(rows)})</summary>{table}</details>'
    return f'<div class="panel" style="margin-top:16px">{fold}</div>' if rows else ''


def _config(config: Mapping[str, Any]) -> str:
    """Every leaf of the resolved config, with a field to filter them by."""
    leaves = flatten(config)
    rows = ''.join(
        f'<tr><td>{escape(path)}</td><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>'
        for path, value in leaves.items()
    )
    table = (
        '<input type="search" data-filters="config" placeholder="filter" aria-label="filter the config">'
        f'<div class="scroll"><table class="config"><tbody id="config">{rows}</tbody></table></div>'
    )
    fold = f'<details><summary>All fields ({len(leaves)})</summary>{table}</details>'
    return _section('Config', f'<div class="panel">{fold}</div>') if leaves else ''


def _section(title: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2>\n{body}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; all columns after the first hold numbers."""
    kinds = ['', *[' class="number"'] * (len(head) - 1)]
    top = ''.join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = [''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    body = ''.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'

"""An experiment on one page: its README, and what `results.csv` holds as figures and a table.

    python experiments/report.py arithmetic
    python experiments/report.py all --into=runs/reports

Of stages the page has curves, every seed and their median, and the last values; of a sweep what its settings do, or the
isoFLOP valleys, the law with its intervals and what it foretells. It needs no network; pip install -e '.[report]'.
"""

import argparse
import html
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etils import epath

from experiments.curves import Point, by_step, last
from tpu_llm.config import ConfigError, nearest
from tpu_llm.scaling import drawn
from tpu_llm.scaling.figures import axis, charts, choice, drawing, drawn_page, figure, hue, plotly, words
from tpu_llm.scaling.points import read
from tpu_llm.scaling.report import runs_section
from tpu_llm.scaling.table import COLUMNS
from tpu_llm.scaling.varied import Row, label, read_rows, settings, settings_section
from tpu_llm.train.chart import number
from tpu_llm.train.metrics import replace_text
from tpu_llm.train.page import section, table

HERE = Path(__file__).resolve().parent
MEASURED = 'measured'  # where in the page the figures begin


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', help='of a folder beside this file, or all')
    parser.add_argument('--into', type=Path, default=Path('runs/reports'), help='default runs/reports')
    options = parser.parse_args(argv)
    there = sorted(path.parent.name for path in HERE.glob('*/README.md'))
    try:
        if options.name not in (*there, 'all'):
            raise ConfigError(f'there is no experiment {options.name!r}{nearest(options.name, there)}; all makes all')
        for name in there if options.name == 'all' else [options.name]:
            print(write(HERE / name, options.into))
    except (ConfigError, OSError) as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def write(folder: Path, into: Path) -> Path:
    """Writes the page of an experiment and gives its path."""
    plotly()
    path = into / f'{folder.name}.html'
    results = folder / 'results.csv'
    title, text = readme(folder, into, drawn_there=results.exists())
    parts = [f'<div class="panel prose">{text}</div>']
    if results.exists():
        rows = read_rows(epath.Path(results))
        parts.append(
            f'<div id="{MEASURED}">{_of_stages(rows) if "stage" in rows[0] else _of_runs(rows, results)}</div>'
        )
    into.mkdir(parents=True, exist_ok=True)
    header = f'<h1>{html.escape(title)}</h1>\n<p>experiments/{folder.name}</p>'
    replace_text(epath.Path(path), drawn_page(title, header, '\n'.join(parts)))
    return path


# ------------------------------------------------------------------------------------------------------------ README


def readme(folder: Path, into: Path, *, drawn_there: bool) -> tuple[str, str]:
    """The title, and the rest as HTML: links lead from the page to the same files, pictures to what the page draws."""
    from markdown_it import MarkdownIt

    def link(renderer: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
        target = str(tokens[i].attrs['href'])
        if '://' not in target and not target.startswith('#'):
            tokens[i].attrs['href'] = os.path.relpath(folder / target, into)
        return renderer.renderToken(tokens, i, options, env)

    def picture(renderer: Any, tokens: Any, i: int, options: Any, env: Any) -> str:
        source = os.path.relpath(folder / tokens[i].attrs['src'], into)
        return (
            f'<a href="{f"#{MEASURED}" if drawn_there else html.escape(source)}">{html.escape(tokens[i].content)}</a>'
        )

    made = MarkdownIt('commonmark', {'html': False}).enable('table')
    made.add_render_rule('link_open', link)
    made.add_render_rule('image', picture)
    made.add_render_rule('table_open', lambda *_: '<div class="scroll"><table>')
    made.add_render_rule('table_close', lambda *_: '</table></div>')
    heading, _, rest = (folder / 'README.md').read_text().partition('\n')
    return heading.removeprefix('# '), made.render(rest)


# ------------------------------------------------------------------------------------------------------------ stages


def _of_stages(rows: Sequence[Row]) -> str:
    """Curves of every stage for the metric that is picked, and the table of last values."""
    points = [Point(row['stage'], str(row['run']), row['step'], row['metric'], row['value']) for row in rows]
    stages, names = (list(dict.fromkeys(each)) for each in zip(*((p.stage, p.metric) for p in points), strict=True))
    seeds = sorted({point.run for point in points})
    curved = {name: [stage for stage in stages if len(by_step(points, stage, name)) > 1] for name in names}
    shown = [name for name in names if curved[name]]
    shown.sort(key=lambda name: (-len(curved[name]), -_moved(points, name, curved[name])))
    figures = [
        figure(
            stage,
            '',
            drawing([], axis('step'), axis()),
            look='third',
            follows='metric',
            choices={
                name: [
                    [trace.to_plotly_json() for trace in _curve(points, stage, name, seeds)],
                    _range([point.value for point in points if point.metric == name and point.stage in curved[name]]),
                ]
                for name in shown
                if stage in curved[name]
            },
        )
        for stage in stages
        if any(stage in curved[name] for name in shown)
    ]
    lines = 'Bold: the median of the seeds, the band from lowest to highest; thin: each seed.'
    about = lines if len(seeds) > 1 else 'One run.'
    picks = f'<div class="picks">{choice("metric", "metric", shown, pick="metric")}</div>'
    head = f'{picks}{drawn.note(about)}'
    body = [[stage, *(_last(points, stage, name) for name in names)] for stage in stages]
    values = f'<div class="panel runs">{table(["stage", *(_name(name) for name in names)], body)}</div>'
    note = drawn.note('The median of the seeds’ last values, and the lowest and highest.') if len(seeds) > 1 else ''
    return section('Curves', head + charts(figures)) + section('Last values', note + values)


def _moved(points: Sequence[Point], name: str, stages: Sequence[str]) -> float:
    """The mean share of a metric's range that stages go through: of those of as many stages, what moves comes first."""
    values = [point.value for point in points if point.metric == name]
    medians = [[statistics.median(each) for each in by_step(points, stage, name).values()] for stage in stages]
    return statistics.mean(max(each) - min(each) for each in medians) / (max(values) - min(values) or 1.0)


def _curve(points: Sequence[Point], stage: str, name: str, seeds: Sequence[str]) -> Iterator[Any]:
    go = plotly()
    steps = by_step(points, stage, name)
    if len(seeds) > 1:
        low, high = [min(values) for values in steps.values()], [max(values) for values in steps.values()]
        band = {'mode': 'lines', 'line': {'width': 0}, 'fill': 'toself', 'fillcolor': hue(0), 'opacity': 0.18}
        x, y = [*steps, *reversed(steps)], [*low, *reversed(high)]
        yield go.Scatter(x=x, y=y, hoverinfo='skip', **band)
        for i, seed in enumerate(seeds):
            own = {p.step: p.value for p in points if (p.stage, p.metric, p.run) == (stage, name, seed)}
            yield _line(own, {'color': hue(i + 1), 'width': 1}, words(seed))
    medians = {step: statistics.median(values) for step, values in steps.items()}
    yield _line(medians, {'color': hue(0), 'width': 2.4}, 'median' if len(seeds) > 1 else words(seeds[0]))


def _line(values: dict[int, float], look: dict[str, Any], name: str) -> Any:
    about = f'<b>{name}</b><br>%{{y:.4g}} at step %{{x:,}}<extra></extra>'
    x, y = list(values), list(values.values())
    return plotly().Scatter(x=x, y=y, mode='lines', line=look, name=name, hovertemplate=about)


def _range(values: Sequence[float]) -> list[float]:
    """One for all stages, with a margin."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return [low - margin, high + margin]


def _last(points: Sequence[Point], stage: str, name: str) -> str:
    values = last(points, stage, name)
    if not values:
        return ''
    middle = statistics.median(values)
    spread = f' ({number(min(values))} to {number(max(values))})' if len(values) > 1 else ''
    return f'<data value="{middle}">{number(middle)}{spread}</data>'


def _name(metric: str) -> str:
    return html.escape(metric.removeprefix('heldout_').replace('_', ' '))


# -------------------------------------------------------------------------------------------------------------- runs


def _of_runs(rows: Sequence[Row], results: Path) -> str:
    """Of a sweep's runs: a law where their FLOPs are known, else what the settings do; and the table."""
    if 'flops' in rows[0]:
        return drawn.law(read(results)) + runs_section(rows, _columns(rows), 'loss')
    varied = settings(rows)
    named = [{'name': ', '.join(f'{name} {label(row[name])}' for name in varied)} | row for row in rows]
    return settings_section(named, varied, 'loss', highest=False) + runs_section(named, varied, 'loss')


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """Those that a sweep's own table does not have."""
    return {name: name.replace('_', ' ') for name in rows[0] if name not in COLUMNS}


if __name__ == '__main__':
    sys.exit(main())

"""The table and the picture of an experiment's README, from the workdirs of its seeds.

    python experiments/curves.py runs/arithmetic-0 runs/arithmetic-1 runs/arithmetic-2 --into=experiments/arithmetic \
        --metrics=heldout_form,heldout_right,heldout_accuracy --picture=heldout_right

A workdir is one of `tpu_llm.train.stages.Stages`: a folder a stage. Written into the folder are `results.csv` (every
held-out value of every stage and seed) and `curves.svg`; printed is the table: of each stage the median of the seeds'
last values, and how long it took.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tpu_llm.train import metrics
from tpu_llm.train.ledger import load, summarize


class Point(NamedTuple):
    """One value of one run."""

    stage: str
    run: str
    step: int
    metric: str
    value: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, help='workdirs, one a seed')
    parser.add_argument('--metrics', required=True, type=lambda text: text.split(','), help='columns of the table')
    parser.add_argument('--picture', default='', help='the metric that is drawn, or several with commas')
    parser.add_argument('--into', type=Path, required=True, help='folder for results.csv and curves.svg')
    args = parser.parse_args(argv)
    stages = [
        path.parent.name for path in sorted(args.runs[0].glob('*/metrics.jsonl'), key=lambda p: p.stat().st_mtime)
    ]
    points = [point for run in args.runs for stage in stages for point in read(run, stage)]
    args.into.mkdir(parents=True, exist_ok=True)
    with (args.into / 'results.csv').open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(Point._fields)
        writer.writerows(point._replace(value=round(point.value, 4)) for point in points)
    print(table(points, stages, args.metrics, {stage: seconds(args.runs, stage) for stage in stages}))
    if args.picture:
        draw(points, stages, args.picture.split(','), args.into / 'curves.svg')


def read(run: Path, stage: str) -> list[Point]:
    lines = metrics.read(run / stage / 'metrics.jsonl')
    return [
        Point(stage, run.name, line['step'], name, value)
        for line in lines
        for name, value in line.items()
        if name.startswith('heldout_') or name in ('kl', 'reward', 'response_tokens')
    ]


def seconds(runs: Sequence[Path], stage: str) -> float:
    return statistics.median(summarize(load(run / stage)).wall for run in runs)


def last(points: Sequence[Point], stage: str, metric: str) -> list[float]:
    """The last value of each run."""
    found = {p.run: p.value for p in points if (p.stage, p.metric) == (stage, metric)}
    return list(found.values())


def table(points: Sequence[Point], stages: Sequence[str], columns: Sequence[str], took: dict[str, float]) -> str:
    """In Markdown; with several runs the median, and the lowest and highest."""

    def cell(stage: str, column: str) -> str:
        values = last(points, stage, column)
        if not values:
            return ''
        spread = f' ({min(values):.3g} to {max(values):.3g})' if len(values) > 1 else ''
        return f'{statistics.median(values):.3g}{spread}'

    heads = ['stage', *(column.removeprefix('heldout_') for column in columns), 'seconds']
    lines = ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads)]
    for stage in stages:
        cells = [stage, *(cell(stage, column) for column in columns), f'{took[stage]:.0f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(points: Sequence[Point], stages: Sequence[str], drawn: Sequence[str], path: Path) -> None:
    """A panel for each metric of a stage that has a curve: a thin line a run, and their median."""
    import matplotlib

    matplotlib.use('svg')
    matplotlib.rcParams['svg.hashsalt'] = 'tpu_llm'  # the same points give the same file
    from matplotlib import pyplot

    curves = {(metric, stage): by_step(points, stage, metric) for metric in drawn for stage in stages}
    shown = [key for key, curve in curves.items() if len(curve) > 1]
    if not shown:
        raise SystemExit('nothing to draw: a curve needs two points')
    columns = min(4, len(shown)) if len(drawn) == 1 else max(1, len(shown) // len(drawn))
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(2.6 * columns, 2.2 * lines),
        sharey=True if len(drawn) == 1 else 'row',
        squeeze=False,
        layout='constrained',
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (metric, stage) in zip(axes.flat, shown, strict=False):
        curve = curves[metric, stage]
        for run in sorted({p.run for p in points}):
            own = [(p.step, p.value) for p in points if (p.stage, p.metric, p.run) == (stage, metric, run)]
            axis.plot(*zip(*own, strict=True), color='tab:blue', alpha=0.35, linewidth=0.8)
        axis.plot(list(curve), [statistics.median(values) for values in curve.values()], color='tab:blue')
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel('step', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for line in range(lines):
        axes[line][0].set_ylabel(shown[line * columns][0], fontsize=8)
    figure.savefig(path, metadata={'Date': None})


def by_step(points: Sequence[Point], stage: str, metric: str) -> dict[int, list[float]]:
    steps: dict[int, list[float]] = {}
    for point in points:
        if (point.stage, point.metric) == (stage, metric):
            steps.setdefault(point.step, []).append(point.value)
    return dict(sorted(steps.items()))


if __name__ == '__main__':
    main()

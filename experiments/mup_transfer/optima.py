"""The table of README.md, from the sweep's workdir: the best learning rate by width, and how it moves.

    python experiments/mup_transfer/optima.py runs/mup_transfer --into=experiments/mup_transfer

Reads each run's metrics.jsonl, writes `results.csv` (a line a run) and `rates.svg` into the folder, by default the
workdir itself, and prints the table. An optimum is the minimum of a parabola through the lowest loss and its
neighbours on the grid, over the logarithm of the rate.
"""

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tpu_llm.config import ConfigError
from tpu_llm.scaling import record
from tpu_llm.scaling.sweep import RUNS
from tpu_llm.train import metrics

LAST = 20  # steps, or all there are, whose mean loss a run is judged by


class Point(NamedTuple):
    mup: bool
    width: int
    rate: float
    loss: float  # nats a token


class Optimum(NamedTuple):
    rate: float
    loss: float
    inside: bool  # not at an end of the grid


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('workdir', type=Path, help='of the sweep')
    parser.add_argument('--into', type=Path, help='folder for results.csv and rates.svg; default: the workdir')
    args = parser.parse_args(argv)
    into = args.into or args.workdir
    losses = {name: last(args.workdir / RUNS / name) for name in finished(args.workdir)}
    points = sorted(point(name, values) for name, values in losses.items())
    into.mkdir(parents=True, exist_ok=True)
    with (into / 'results.csv').open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(Point._fields)
        writer.writerows(point._replace(loss=round(point.loss, 4)) for point in points)
    picture(points, into / 'rates.svg')
    print(table(points))
    counts = ' or '.join(map(str, sorted({len(values) for values in losses.values()})))
    print(f'\nlosses are means of the last {counts} steps')


def finished(workdir: Path) -> list[str]:
    """The runs of the sweep. An optimum of a part of them would be another."""
    try:
        runs = record.read(workdir)['runs']
    except ConfigError as error:
        raise SystemExit(f'error: {error}') from None
    for name, run in runs.items():
        if run['status'] != 'finished':
            raise SystemExit(
                f'error: run {name} is {run["status"]}; an optimum is of a grid of which all runs finished'
            )
    return list(runs)


def last(folder: Path) -> list[float]:
    return [line['loss'] for line in metrics.read(folder / 'metrics.jsonl')[-LAST:]]


def point(name: str, losses: list[float]) -> Point:
    mup, width, rate = re.findall(r'=([\w.-]+)', name)
    return Point(mup == 'True', int(width), float(rate), statistics.mean(losses))


def of(points: list[Point], mup: bool) -> list[Point]:
    """Those of a parametrisation; at the base's width both are the same model."""
    base = min(point.width for point in points)
    return [point for point in points if point.mup == mup or point.width == base]


def picture(points: list[Point], path: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout='constrained')
    for panel, mup in zip(panels, (False, True), strict=True):
        own = of(points, mup)
        for width in sorted({point.width for point in own}):
            line = [point for point in own if point.width == width]
            panel.plot([point.rate for point in line], [point.loss for point in line], 'o-', label=f'width {width}')
        panel.set(xscale='log', xlabel='learning rate', title='muP' if mup else 'standard')
        rates = sorted({point.rate for point in points})
        panel.set_xticks(rates, [f'{rate:g}' for rate in rates])
        panel.minorticks_off()
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('training loss, nats a token')
    panels[1].legend(frameon=False)
    matplotlib.rcParams['svg.hashsalt'] = 'tpu_llm'  # the same points give the same file
    figure.savefig(path, metadata={'Date': None})


def table(points: list[Point]) -> str:
    """In Markdown: the losses by rate, the optimum, and below the power of the width that it goes by."""
    rates = sorted({point.rate for point in points})
    lines = ['| | width | ' + ' | '.join(f'{rate:g}' for rate in rates) + ' | best rate | its loss |']
    lines.append('|---' * (len(rates) + 4) + '|')
    for mup, title in ((False, 'standard'), (True, 'muP')):
        own = of(points, mup)
        found = {}
        for width in sorted({point.width for point in own}):
            losses = {point.rate: point.loss for point in own if point.width == width}
            best = found[width] = optimum(losses)
            cells = [f'{losses[rate]:.3f}' for rate in rates]
            at = f'{best.rate:.2g}' + ('' if best.inside else ' (end of the grid)')
            lines.append(f'| {title} | {width} | ' + ' | '.join(cells) + f' | {at} | {best.loss:.3f} |')
        power = np.polyfit(np.log(list(found)), [math.log(best.rate) for best in found.values()], 1)[0]
        lines.append(f'| {title} | best rate ~ width^ |' + ' |' * len(rates) + f' {power:+.2f} | |')
    return '\n'.join(lines)


def optimum(losses: dict[float, float]) -> Optimum:
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if best in (0, len(rates) - 1):
        return Optimum(rates[best], losses[rates[best]], inside=False)
    near = rates[best - 1 : best + 2]
    curve = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    place = -curve[1] / (2 * curve[0])
    return Optimum(math.exp(place), float(np.polyval(curve, place)), inside=True)


if __name__ == '__main__':
    main()

"""The table of README.md, from the sweep's workdir: the best learning rate by width, and how it moves.

    python experiments/mup_transfer/optima.py runs/mup_transfer

Reads each run's metrics.jsonl, writes `results.csv` (a line a run) and `rates.svg` beside this file and prints the
table. An optimum is the minimum of a parabola through the lowest loss and its neighbours on the grid, over the
logarithm of the rate.
"""

import csv
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpu_llm.train import metrics  # noqa: E402

LAST = 20  # steps whose mean loss a run is judged by


class Point(NamedTuple):
    mup: bool
    width: int
    rate: float
    loss: float  # nats a token


class Optimum(NamedTuple):
    rate: float
    loss: float
    inside: bool  # not at an end of the grid


def main(workdir: Path) -> None:
    points = sorted(read(folder) for folder in (workdir / 'runs').iterdir())
    with (HERE / 'results.csv').open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(Point._fields)
        writer.writerows(point._replace(loss=round(point.loss, 4)) for point in points)
    picture(points)
    print(table(points))


def read(folder: Path) -> Point:
    mup, width, rate = re.findall(r'=([\w.-]+)', folder.name)
    losses = [line['loss'] for line in metrics.read(folder / 'metrics.jsonl')[-LAST:]]
    return Point(mup == 'True', int(width), float(rate), statistics.mean(losses))


def of(points: list[Point], mup: bool) -> list[Point]:
    """Those of a parametrisation; at the base's width both are the same model."""
    base = min(point.width for point in points)
    return [point for point in points if point.mup == mup or point.width == base]


def picture(points: list[Point]) -> None:
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
    figure.savefig(HERE / 'rates.svg', metadata={'Date': None})


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
    main(Path(sys.argv[1]))

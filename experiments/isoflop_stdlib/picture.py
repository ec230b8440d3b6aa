"""The picture of the README: the valley of each budget, and what the law says of all runs.

python experiments/isoflop_stdlib/picture.py experiments/isoflop_stdlib/results.csv --hold-out=1
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib import pyplot

from tpu_llm.scaling.fit import fit
from tpu_llm.scaling.laws import Chinchilla
from tpu_llm.scaling.points import drop_highest, hold_out, read
from tpu_llm.scaling.valleys import profiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', type=Path)
    parser.add_argument('--hold-out', type=int, default=1)
    parser.add_argument('--drop-highest', type=int, default=0)
    args = parser.parse_args()
    kept, held = hold_out(read(args.table).points, args.hold_out)
    found = fit(Chinchilla(), drop_highest(kept, args.drop_highest))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for number, valley in enumerate(profiles(kept).valleys):
        color, runs = f'C{number}', valley.runs
        left.plot(runs.parameters, runs.loss, 'o', color=color, label=f'{valley.flops:.1e} FLOPs')
        if not valley.problem:
            sizes = np.geomspace(valley.near.parameters.min(), valley.near.parameters.max())
            left.plot(sizes, valley(sizes), '-', color=color, linewidth=1)
        right.plot(found.predict(runs), runs.loss, 'o', color=color)
    right.plot(found.predict(held), held.loss, '*', color='k', markersize=12, label='held out')
    ends = [kept.loss.min() * 0.85, kept.loss.max()]
    right.plot(ends, ends, '-', color='0.7', zorder=0)
    left.set(xscale='log', xlabel='parameters', ylabel='held-out loss, nats a token')
    right.set(xlabel='loss by the law', ylabel='loss as measured')
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
    matplotlib.rcParams['svg.hashsalt'] = 'tpu_llm'  # the same points give the same file
    figure.savefig(args.table.parent / 'isoflop.svg', metadata={'Date': None})


if __name__ == '__main__':
    main()

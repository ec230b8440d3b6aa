"""What the loop costs: time a step in `fit` (data, logging, progress, ledger) over the bare compiled step.

    JAX_PLATFORMS=cpu python benchmarks/loop_overhead.py

`fit` and bare steps take turns in one process; medians are compared.
"""

import statistics
import tempfile
import time

from tpu_llm.parallel import heap

heap.keep()  # before NumPy starts threads

import model as benchmark_model
import numpy as np
from train_step import Ours

from tpu_llm.train import ledger, metrics
from tpu_llm.train.loop import fit

ROUNDS, STEPS = 5, 31


def in_fit() -> tuple[float, float]:
    """(seconds a step, share of the training time spent waiting for data)."""
    with tempfile.TemporaryDirectory() as workdir:
        run = benchmark_model.get_config(f'steps={STEPS}')
        fit(run, workdir)
        path = f'{workdir}/metrics.jsonl'
        lines = [line for line in metrics.read(path) if 'tokens_per_second' in line]
        seconds = ledger.load(workdir)[-1]['seconds']
        speed = statistics.median(line['tokens_per_second'] for line in lines)
        return 8 * 256 / speed, seconds['data_wait'] / (seconds['data_wait'] + seconds['step'])


def bare(ours: Ours) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        ours.run()
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    ours = Ours(0)
    ours.run()
    in_fit()
    pairs = [(in_fit(), bare(ours)) for _ in range(ROUNDS)]
    ratios = [step / alone for (step, _), alone in pairs]
    print(f'step in fit   {statistics.median(step for (step, _), _ in pairs) * 1e3:7.1f} ms')
    print(f'bare step     {statistics.median(alone for _, alone in pairs) * 1e3:7.1f} ms')
    print(f'overhead      {100 * (statistics.median(ratios) - 1):+7.1f} %   (pairs: {np.round(ratios, 3).tolist()})')
    print(f'data wait     {100 * statistics.median(wait for (_, wait), _ in pairs):7.2f} % of the training time')


if __name__ == '__main__':
    main()

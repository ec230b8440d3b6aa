"""What a sweep costs besides the steps of its runs: 20 tiny runs in local processes, from the command to its end.

    JAX_PLATFORMS=cpu python benchmarks/sweep.py

The steps alone are what the runs' own ledgers charge to steps, shared out over the processes. The rest is importing,
the tokenizer, compiling, evaluating, saving and waiting for the last run. The compilation cache begins empty.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.quickstart import get_config
from tpu_llm.data.tokenizer import TrainedBPE
from tpu_llm.scaling import local, table
from tpu_llm.scaling import sweep as sweeps
from tpu_llm.scaling.combinators import name, product
from tpu_llm.train import ledger

STEPS, VOCABULARY = 500, 1024


def sweep(arg=None):
    """Four widths x five learning rates: programs of four shapes, which the rates share."""
    for point in product(width=[48, 64, 96, 128], rate=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3]):
        run = get_config('smoke')
        run.data.tokenizer, run.model.vocab_size = TrainedBPE(vocab_size=VOCABULARY), VOCABULARY
        run.hooks = run.hooks[:1]  # the held-out loss, at the end
        run.hooks[0].every = 0
        run.model.width, run.model.heads, run.model.kv_heads = point['width'], 2, 2
        run.model.head_dim, run.model.mlp_width = point['width'] // 2, 2 * point['width']
        run.optimizer.schedule.peak = point['rate']
        run.steps, run.report, run.log_every = STEPS, False, 20
        yield name(point), run


def main() -> None:
    env = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, 'launch/sweep.py', '--config=benchmarks/sweep.py', f'--workdir={folder}/w']
        start = time.perf_counter()
        subprocess.run(words, cwd=ROOT, env=env, check=True)
        wall = time.perf_counter() - start
        jobs = sweeps.load('benchmarks/sweep.py', [], f'{folder}/w', [])
        rows = [table.row(job, '') for job in jobs]
        processes = local.budget(len(jobs)).processes
        seconds = {phase: sum(row[f'ledger.{phase}'] for row in rows) for phase in ledger.PHASES}
        tries = [sweeps.tries(job.folder)[-1].seconds for job in jobs]
    alone = seconds['step'] / processes
    print(f'whole command             {wall:7.1f} s   ({len(jobs)} runs, {processes} processes)')
    print(f'steps alone               {alone:7.1f} s   ({STEPS} a run)')
    print(f'ratio                     {wall / alone:7.2f}')
    for phase in ('compile', 'eval', 'restore', 'data_wait', 'save', 'init', 'other'):
        print(f'  {phase:<22} {seconds[phase] / processes:8.1f} s')
    rest = (sum(tries) - sum(seconds.values())) / processes
    print(f'  outside of ledgers     {rest:8.1f} s   (tokens and tokenizer, once; report)')
    print(f'  processes and the end  {wall - sum(tries) / processes:8.1f} s')


if __name__ == '__main__':
    main()

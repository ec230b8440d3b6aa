"""What a sweep would run, before it runs: sizes, lengths and the memory that each run is taken to need."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tpu_llm.nn.param import count_parameters
from tpu_llm.scaling import sweep
from tpu_llm.scaling.memory import need
from tpu_llm.scaling.points import counted
from tpu_llm.scaling.progress import length, work
from tpu_llm.scaling.sweep import Job
from tpu_llm.train.progress import short


def listing(jobs: Sequence[Job]) -> Group:
    """A line a run; what only its data can tell is left empty."""
    table = Table(box=None)
    table.add_column('run')
    for column in ('parameters', 'steps', 'tokens', 'FLOPs', 'GiB'):
        table.add_column(column, justify='right')
    for job in jobs:
        runs = [run for _, run, _ in sweep.trained(job.config, job.folder)]
        steps = length(job)
        size = short(count_parameters(runs[-1].model.make())) if runs else ''
        tokens = short(tokens_of(runs)) if steps else ''
        flops = f'{work(job):.3g}' if steps else ''
        table.add_row(Text(job.name), size, f'{steps:,}' if steps else '', tokens, flops, f'{need(job.config):.1f}')
    total = sum(work(job) for job in jobs if length(job))
    return Group(table, Text(f'{counted(len(jobs))}, {total:.3g} FLOPs in all'))


def tokens_of(runs: Sequence[Any]) -> int:
    """Positions that runs train on; the last step of each is whole."""
    total = 0
    for run in runs:
        step = run.data.global_batch * run.data.seq_len
        total += step * (run.steps or -(-run.tokens // step))
    return total

"""One table of every run of a sweep: `table.csv`, and `table.parquet` where pyarrow is installed.

A row holds the run's name, status and labels, what a scaling law is fitted to, every leaf of its config
(`config.model.width`), the last value of every metric (`final.bits_per_byte`) and where its time went
(`ledger.step`, in seconds). Of stages those are `final.STAGE.…`, and the numbers of the law are the last one's.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tpu_llm import config as configs
from tpu_llm.config import ConfigError
from tpu_llm.data.corrupted import UL2, Spans
from tpu_llm.models.flops_encoder import active_parameters, train_flops
from tpu_llm.nn.param import count_parameters
from tpu_llm.scaling import sweep
from tpu_llm.scaling.sweep import Job
from tpu_llm.train import ledger, metrics
from tpu_llm.train.summary import SUMMARY

CSV, PARQUET = 'table.csv', 'table.parquet'
Row = dict[str, Any]

# What every table has, in this order. Of `loss`, in nats a token, `loss_of` is the metric that it is.
COLUMNS = ('name', 'status', 'reason', 'tries', 'config_hash', 'parameters', 'active_parameters', 'tokens', 'flops')
COLUMNS += ('loss', 'loss_of', 'steps', 'seconds', 'goodput')
_LOSSES = ('heldout_loss', 'loss')  # the first that a run has


def row(job: Job, status: str) -> Row:
    """What is known of a run by now. Raises ConfigError where a label is called like another column."""
    tried = sweep.tries(job.folder)
    known: Row = {
        'name': job.name,
        'status': status,
        'reason': tried[-1].reason if tried else '',
        'tries': len(tried),
        'config_hash': configs.digest(job.config),
    }
    rest: Row = {}
    for stage, run, folder in sweep.trained(job.config, job.folder):
        below = f'{stage}.' if stage else ''
        final = finals(folder)
        spent = ledger.summarize(ledger.load(folder)) if (folder / ledger.FILE).exists() else None
        known |= _law(run, final) | _time(spent)
        rest |= {f'final.{below}{name}': value for name, value in final.items()}
        rest |= {f'ledger.{below}{name}': value for name, value in (spent.seconds if spent else {}).items()}
    if status == 'diverged':  # its last loss is finite, perhaps, and no result
        known |= {'loss': None, 'loss_of': None}
    leaves = configs.flatten(configs.dump(job.config))
    if taken := job.labels.keys() & {*COLUMNS, *leaves, *rest}:
        raise ConfigError(f'run {job.name}: label {sorted(taken)[0]!r} is a column of every table; call it otherwise')
    return known | job.labels | leaves | rest


def finals(folder: epath.Path) -> Row:
    """The last value of every metric: of a run that is at its end by its summary, else of what was logged so far."""
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    path = folder / 'metrics.jsonl'
    return {name: value for line in metrics.read(path) for name, value in line.items()} if path.exists() else {}


def _law(run: Any, final: Mapping[str, Any]) -> Row:
    """Sizes, exactly, and the loss; what is not known yet is left out."""
    form = run.data.form
    targets = form.target_len if isinstance(form, (Spans, UL2)) else 0
    found = {name: final[name] for name in ('parameters', 'active_parameters', 'tokens') if name in final}
    if 'parameters' not in found and run.peft is None:
        found = {
            'parameters': count_parameters(run.model.make()),
            'active_parameters': active_parameters(run.model),
        } | found
    if 'tokens' in final:
        found['flops'] = final['tokens'] * train_flops(run.model, run.data.seq_len, targets)
    if 'step' in final:
        found['steps'] = final['step']
    return found | _loss(final)


def _loss(final: Mapping[str, Any]) -> Row:
    of = next((name for name in _LOSSES if name in final), None)
    return {'loss': final[of], 'loss_of': of} if of else {}


def last_loss(job: Job) -> Row:
    """`loss` and `loss_of` of a run, of stages those of the last that has them; empty where none has."""
    found: Row = {}
    for _, _, folder in sweep.trained(job.config, job.folder):
        found |= _loss(finals(folder))
    return found


def _time(spent: ledger.Summary | None) -> Row:
    return {'seconds': spent.wall, 'goodput': spent.goodput} if spent else {}


# ---------------------------------------------------------------------------------------------------------- writing


def write(rows: Sequence[Row], workdir: epath.PathLike) -> str:
    """Writes both files, each in one stroke; says what is missing for Parquet, or nothing."""
    workdir = epath.Path(workdir)
    columns = _columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    metrics.replace_text(workdir / CSV, text.getvalue())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return f"{PARQUET} is not written, {CSV} is: pip install -e '.[parquet]'"
    table = pyarrow.table({column: _typed([row.get(column) for row in rows]) for column in columns})
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer)
    _replace_bytes(workdir / PARQUET, buffer.getvalue().to_pybytes())
    return ''


def _columns(rows: Sequence[Row]) -> list[str]:
    """Those that all tables have, then labels, configs, metrics and times, each in the order in which they come up."""
    found = dict.fromkeys(column for row in rows for column in row)
    kinds = {'config': 1, 'final': 2, 'ledger': 3}
    rest = [column for column in found if column not in COLUMNS]
    return [*COLUMNS, *sorted(rest, key=lambda column: kinds.get(column.partition('.')[0], 0))]


def _cell(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    # One line a row, for what reads a table by its lines.
    return '' if value is None else str(value).replace('\r', '\\r').replace('\n', '\\n')


def _typed(values: list[Any]) -> list[Any]:
    """A column of one type: numbers, truths, or else text."""
    there = [value for value in values if value is not None]
    kinds = {type(value) for value in there}
    if kinds in ({bool}, {int}, {str}):
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else _cell(value) for value in values]


def _replace_bytes(path: epath.Path, data: bytes) -> None:
    if metrics.is_remote(path):
        path.write_bytes(data)
        return
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    part.write_bytes(data)
    part.replace(path)

"""The table of a sweep, against numbers worked out by hand; and two runs compared."""

import csv
import io
import json
import sys

import pytest
from etils import epath
from rich.console import Console
from toy_sweep import Toy

from tests.train import tiny
from tpu_llm.config import ConfigError, digest, to_json
from tpu_llm.scaling import points, record, show, sweep, table
from tpu_llm.scaling.compare import comparison, find
from tpu_llm.scaling.listing import listing
from tpu_llm.scaling.progress import Progress, last_line, length
from tpu_llm.scaling.sweep import Job, Try
from tpu_llm.train.stages import Stages

PARAMETERS = 2 * 259 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32  # of tests/train/tiny.py
# A training step by a token of a row of 32: three times the forward's maps, head and causal attention.
FLOPS = 3 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 32 * 259 + 4 * 32 * 33 / 2)


def run_of(folder, text, *lines, summary=None, tried=('finished',), **fields):
    """A job that has left these lines of metrics.jsonl behind."""
    config = tiny.get_config(f'text={text}')
    for name, value in fields.items():
        setattr(config, name, value)
    job = Job(folder.name, config, {'budget': 1e12}, epath.Path(folder))
    for status in tried:
        sweep.record(job, Try(status=status))
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if summary:
        (job.folder / 'summary.json').write_text(json.dumps(summary))
        seconds = {'step': 6.0, 'compile': 1.5, 'eval': 0.5}
        ledger = {'start': 'now', 'host': 'h', 'pid': 1, 'token': 't', 'start_step': 0, 'end_step': 12}
        (job.folder / 'ledger.jsonl').write_text(json.dumps(ledger | {'seconds': seconds}) + '\n')
    return job


@pytest.fixture
def jobs(tmp_path, text):
    line = {'step': 12, 'loss': 2.5, 'tokens': 12 * 8 * 32}
    sizes = {'parameters': PARAMETERS, 'active_parameters': PARAMETERS}
    finished = run_of(
        tmp_path / 'runs/a', text, {'step': 4, 'loss': 4.0}, {'step': 8, 'loss': 3.0}, line,
        summary={**sizes, **line, 'heldout_loss': 2.75, 'loads': [1, 2]}, tried=('lost', 'finished'),
    )  # fmt: skip
    diverged = run_of(
        tmp_path / 'runs/b', text, {'step': 4, 'loss': 'nan', 'tokens': 1024}, tried=('diverged',), seed=1
    )
    return [finished, diverged, Job('c', Toy(), {}, epath.Path(tmp_path / 'runs/c'))]


@pytest.fixture
def rows(jobs):
    return [table.row(job, status) for job, status in zip(jobs, ('finished', 'diverged', 'waiting'), strict=True)]


def test_a_row_has_what_a_law_is_fitted_to(jobs, rows):
    row = rows[0]
    assert (row['parameters'], row['active_parameters']) == (PARAMETERS, PARAMETERS)
    assert (row['tokens'], row['steps'], row['tries']) == (3072, 12, 2)
    assert row['flops'] == 3072 * FLOPS
    assert (row['loss'], row['loss_of']) == (2.75, 'heldout_loss')
    assert (row['seconds'], row['goodput']) == (8.0, 0.75)
    assert (row['budget'], row['config_hash']) == (1e12, digest(jobs[0].config))
    assert (row['config.model.width'], row['config.optimizer.schedule.peak']) == (32, 1e-2)
    assert (row['final.loss'], row['ledger.compile'], row['ledger.rollout']) == (2.5, 1.5, 0.0)


def test_a_run_without_a_held_out_loss_has_the_last_of_training(jobs):
    row = table.row(jobs[1], 'running')
    assert str(row['loss']) == 'nan'
    assert (row['loss_of'], row['parameters'], row['status']) == ('loss', PARAMETERS, 'running')


def test_a_run_that_diverged_has_no_loss_to_be_ranked_by(jobs):
    row = table.row(jobs[0], 'diverged')
    assert (row['loss'], row['loss_of'], row['final.loss']) == (None, None, 2.5)


def test_stages_give_the_law_their_last_run_and_finals_by_name(jobs, tmp_path):
    stages = Stages(stages={'first': jobs[1].config, 'second': jobs[0].config})
    job = Job('s', stages, {}, epath.Path(tmp_path / 's'))
    for name, of in (('first', jobs[1]), ('second', jobs[0])):
        _copy(of.folder, job.folder / name)
    row = table.row(job, 'running')
    assert (row['loss'], row['final.second.loss'], row['final.first.tokens']) == (2.75, 2.5, 1024)
    assert row['ledger.second.step'] == 6.0
    assert length(job) == 24
    assert last_line(job)['step'] == 12
    assert not sweep.ended(stages, job.folder)  # the first has no summary
    assert sweep.ended(jobs[0].config, jobs[0].folder)


def _copy(old, new):
    new.mkdir(parents=True)
    for file in old.iterdir():
        (new / file.name).write_bytes(file.read_bytes())


def test_labels_are_columns_and_cannot_hide_one(jobs):
    for label in ('loss', 'config.seed'):
        job = Job('a', jobs[0].config, {label: 1}, jobs[0].folder)
        with pytest.raises(ConfigError, match=f'label {label!r} is a column of every table'):
            table.row(job, 'finished')


def test_the_csv_is_what_a_fit_reads(rows, tmp_path):
    table.write(rows, tmp_path)
    read = list(csv.DictReader((tmp_path / 'table.csv').open()))
    assert list(read[0])[: len(table.COLUMNS)] == list(table.COLUMNS)
    assert (read[0]['final.loads'], read[2]['loss'], read[2]['config.ends']) == ('[1, 2]', '', 'well')
    found = points.read(tmp_path / 'table.csv')
    assert found.points.names == ('a',)
    assert (found.points.parameters[0], found.points.tokens[0], found.points.loss[0]) == (PARAMETERS, 3072, 2.75)
    assert (found.points.flops[0], found.points.budget[0]) == (3072 * FLOPS, 1e12)
    assert found.left_out == {'diverged': 1, 'waiting': 1}


def test_a_row_of_the_csv_is_one_line(rows, tmp_path):
    rows[2]['reason'] = 'a fault\nin two lines'
    table.write(rows, tmp_path)
    lines = (tmp_path / 'table.csv').read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert 'a fault\\nin two lines' in lines[3]


def test_parquet_holds_the_same(rows, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet', reason="needs pyarrow: pip install -e '.[parquet]'")
    assert table.write(rows, tmp_path) == ''
    read = parquet.read_table(tmp_path / 'table.parquet').to_pylist()
    text = list(csv.DictReader((tmp_path / 'table.csv').open()))
    assert list(read[0]) == list(text[0])
    assert read[0]['flops'] == 3072 * FLOPS
    assert read[0]['tokens'] == 3072
    assert read[2]['loss'] is None
    assert [row['status'] for row in read] == ['finished', 'diverged', 'waiting']


def test_without_pyarrow_it_says_how(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert table.write(rows, tmp_path) == "table.parquet is not written, table.csv is: pip install -e '.[parquet]'"
    assert (tmp_path / 'table.csv').exists()


def test_the_record_is_kept_up_to_date(jobs, tmp_path):
    kept = record.Record(jobs, tmp_path, 'page.py', ['--config.seed=1'])
    kept.begin({'a': 'finished', 'b': 'diverged', 'c': 'waiting'})
    kept.changed(jobs[2], 'running')
    found = record.read(tmp_path)
    assert (found['sweep'], found['overrides'], list(found['runs'])) == (
        'page.py',
        ['--config.seed=1'],
        ['a', 'b', 'c'],
    )
    assert found['runs']['c']['status'] == 'running'
    assert found['runs']['a']['labels'] == {'budget': 1e12}
    assert found['runs']['a']['config'] == json.loads(to_json(jobs[0].config))
    assert [row['status'] for row in csv.DictReader((tmp_path / 'table.csv').open())][2] == 'running'


# ----------------------------------------------------------------------------------------------------- on a screen


def printed(thing):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_the_live_table_shows_steps_losses_and_counts(jobs):
    board = show.Board(jobs, {'a': 'finished', 'b': 'waiting', 'c': 'waiting'})
    console = Console(width=100, force_terminal=True, record=True, file=io.StringIO())
    with show.Shown(board, console) as shown:
        shown.changed(jobs[1], 'running')
        shown.changed(jobs[2], 'failed', 'it has [no] reason')
    said = console.export_text()
    assert 'c failed: it has [no] reason' in said
    assert 'b    running   4/12   nan' in said
    assert '1 finished, 1 running, 1 failed' in said


def test_lines_say_each_change_once(jobs, capsys):
    board = show.Board(jobs, {'a': 'waiting', 'b': 'diverged', 'c': 'waiting'})
    with show.Lines(board, Console(width=100)) as lines:
        lines.changed(jobs[0], 'running')
        lines.changed(jobs[0], 'finished')
        lines.tick()
    said = [line.split('  ', 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said == ['a running', 'a finished, heldout_loss 2.7500']


def test_time_left_is_weighed_by_flops(jobs, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr('tpu_llm.scaling.progress.time.monotonic', lambda: next(clock))
    jobs[1].config.steps = 36  # three times the other's work
    progress = Progress(jobs[:2])
    assert progress.remaining({'a': 1.0}, {'a': 0.0, 'b': 1.0}) == pytest.approx(90.0)


def test_a_half_written_line_is_left_alone(jobs):
    with open(jobs[0].folder / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 16, "lo')
    assert last_line(jobs[0])['step'] == 12


def test_a_listing_has_sizes_and_work(jobs):
    said = printed(listing(jobs))
    assert f' a         {PARAMETERS / 1e3:.1f}k     12   3.07k' in said
    assert f'3 runs, {2 * 3072 * FLOPS:.3g} FLOPs in all' in said
    assert '1 run, ' in printed(listing(jobs[:1]))


# ----------------------------------------------------------------------------------------------------- two of them


def test_compare_shows_what_differs(jobs, tmp_path):
    other = run_of(tmp_path / 'runs/d', tmp_path / 'text', {'step': 8, 'loss': 2.0}, {'step': 12, 'loss': 1.5}, seed=7)
    other.config.data = jobs[0].config.data
    other.config.hooks = jobs[0].config.hooks
    sweep.record(other, Try(status='finished'))
    said = printed(comparison('a', str(other.folder), str(tmp_path)))
    lines = [' '.join(line.split()) for line in said.splitlines()]
    assert lines[lines.index('configs') :][:4] == ['configs', 'field A B', 'config.seed 0 7', '']
    assert lines[lines.index('loss') :][:4] == [
        'loss',
        'step A B B − A',
        '8 3.0000 2.0000 -1.0000',
        '12 2.5000 1.5000 -1.0000',
    ]
    assert 'loss 2.5000 1.5000 -1.0000' in lines[lines.index('last values') :]


def test_compare_names_what_is_not_there(jobs, tmp_path):
    record.Record(jobs, tmp_path, 'page.py', []).begin({'a': 'finished', 'b': 'diverged', 'c': 'waiting'})
    with pytest.raises(ConfigError, match='run c has not begun'):
        find('c', str(tmp_path))
    with pytest.raises(ConfigError, match='run e is not in the sweep'):
        find('e', str(tmp_path))
    with pytest.raises(ConfigError, match='give its folder, or --workdir=SWEEP'):
        find('e', None)
    with pytest.raises(ConfigError, match='holds no run that has begun'):
        find(str(tmp_path), None)

"""A whole run in this process: what it leaves in the workdir, that it compiles once, and that it continues exactly."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from tpu_llm.checkpoint import reader
from tpu_llm.config import ConfigError
from tpu_llm.data.sources import Text
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.train import ledger, metrics
from tpu_llm.train.loop import fit
from tpu_llm.train.watch import Diverged

TIMES = ('tokens_per_second',)


def lines(workdir):
    """metrics.jsonl without what depends on the clock."""
    read = metrics.read(workdir / 'metrics.jsonl')
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def assert_same_state(one, other):
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope='module')
def unbroken(text, tmp_path_factory):
    """(workdir, final state, names and counts of programs) of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp('unbroken')
    made = []
    original = Compiled.__init__

    def recording(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiled, '__init__', recording)
        state = fit(tiny.get_config(f'text={text}'), workdir)
    return workdir, state, {program.name: program.compiles for program in made}


def test_each_entry_point_compiles_once(unbroken):
    assert unbroken[2] == {'train step': 1, 'evaluation step': 1}


def test_loss_falls_and_every_step_is_logged(unbroken):
    workdir, state, _ = unbroken
    logged = [line for line in lines(workdir) if 'loss' in line]
    assert [line['step'] for line in logged] == list(range(1, 13))
    assert logged[-1]['loss'] < logged[0]['loss'] - 0.5
    assert logged[-1]['tokens'] == 12 * 8 * 32
    assert {'learning_rate', 'grad_norm', 'nll'} <= logged[0].keys()
    assert int(state.step) == 12


def test_workdir_holds_what_the_docs_say(unbroken):
    workdir, _, _ = unbroken
    evaluations = [line for line in lines(workdir) if 'bits_per_byte' in line]
    assert [line['step'] for line in evaluations] == [4, 8, 12]
    assert 'gzip_bits_per_byte' in evaluations[-1]
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['bits_per_byte'] == evaluations[-1]['bits_per_byte']
    embed, block, norm = 2 * 259 * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32, 32
    assert summary['parameters'] == embed + block + norm
    newest = reader.find(workdir)
    assert newest.step == 12
    assert newest.metrics['bits_per_byte'] == evaluations[-1]['bits_per_byte']
    assert list((workdir / 'tensorboard').iterdir())


def test_a_part_is_scored_on_the_way_and_all_at_the_end(text, tmp_path, capsys):
    run = tiny.get_config(f'text={text},steps=4')
    run.hooks = (HeldOut(source=Text(paths=(f'{text}/*.txt',)), every=2, documents=2, rows=8),)
    fit(run, tmp_path)
    scores = {line['step']: line for line in lines(tmp_path) if 'bits_per_byte' in line}
    assert [step for step in scores if 'bits_per_byte_all' in scores[step]] == [4]
    assert scores[4]['bits_per_byte'] != scores[4]['bits_per_byte_all']
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert (summary['bits_per_byte'], summary['heldout_loss']) == (
        scores[4]['bits_per_byte_all'],
        scores[4]['heldout_loss_all'],
    )
    assert not any(name.endswith('_all') for name in summary)
    said = [line.partition(', perplexity')[0] for line in capsys.readouterr().out.splitlines() if 'held-out' in line]
    bits = [scores[2]['bits_per_byte'], scores[4]['bits_per_byte'], scores[4]['bits_per_byte_all']]
    assert said == [f'step {s}: held-out {b:.4f} bits per byte' for s, b in zip((2, 4, 4), bits, strict=True)]


def test_best_must_be_a_metric_of_a_hook(text, tmp_path):
    run = tiny.get_config(f'text={text}')
    run.checkpoints.best = 'bits_per_bite'
    with pytest.raises(ConfigError, match=r"best = 'bits_per_bite' is not .* \(did you mean 'bits_per_byte'\?\)"):
        fit(run, tmp_path)


def test_continues_bitwise_after_stopping_anywhere(unbroken, text, tmp_path):
    workdir, expected, _ = unbroken
    for steps in (5, 7, 12):
        # The schedule is that of 12 steps: only where it stops is varied.
        run = tiny.get_config(f'text={text}')
        run.hooks = (*run.hooks, StopAfter(stop=steps))
        state = fit(run, tmp_path)
    assert_same_state(state, expected)
    assert lines(tmp_path) == lines(workdir)
    starts = ledger.load(tmp_path)
    assert [record['end_step'] for record in starts] == [6, 8, 12]
    assert json.loads((tmp_path / 'summary.json').read_text())['seconds'] == ledger.summarize(starts).wall


@dataclasses.dataclass(kw_only=True, slots=True)
class StopAfter:
    """Preempts the run, as a SIGTERM would."""

    stop: int

    def due(self, step, steps):
        return step == self.stop < steps

    def open(self, session):
        return lambda step, weights: os.kill(os.getpid(), signal.SIGTERM) or {}


@dataclasses.dataclass(kw_only=True, slots=True)
class Fails:
    """A hook with a fault, due at the step."""

    at: int

    def due(self, step, steps):
        return step == self.at

    def open(self, session):
        return lambda step, weights: {}['no such key']


def test_a_hook_that_fails_does_not_lose_a_step_that_is_to_be_saved(text, tmp_path, capsys):
    run = tiny.get_config(f'text={text},steps=4,every=4')
    run.hooks = (*run.hooks, Fails(at=4))
    with pytest.raises(KeyError, match='no such key'):
        fit(run, tmp_path)
    saved = reader.find(tmp_path)
    assert saved.step == 4
    assert saved.metrics['bits_per_byte'] == lines(tmp_path)[-1]['bits_per_byte'], 'of the hook before it'
    run.hooks = run.hooks[:-1]
    fit(run, tmp_path)
    assert 'all 4 steps are done' in capsys.readouterr().out


def test_finished_run_does_nothing_more(unbroken, text, capsys):
    workdir, expected, _ = unbroken
    before = (workdir / 'metrics.jsonl').read_bytes()
    state = fit(tiny.get_config(f'text={text}'), workdir)
    assert_same_state(state, expected)
    assert 'all 12 steps are done' in capsys.readouterr().out
    assert (workdir / 'metrics.jsonl').read_bytes() == before


def real_vocabulary(name, array):
    """Without the padding, which differs from mesh to mesh."""
    return array[:259] if name == 'embed.table' else array[:, :259] if name == 'head.kernel' else array


@pytest.mark.parametrize('mesh', [Mesh(fsdp=8), Mesh(data=2, fsdp=2, tensor=2)])
def test_restores_onto_another_mesh(unbroken, text, tmp_path, mesh):
    """A run stopped on one device goes on over eight, and ends where the unbroken one does."""
    _, expected, _ = unbroken
    run = tiny.get_config(f'text={text}')
    run.mesh = Mesh(data=8, fsdp=1)
    run.hooks = (StopAfter(stop=5),)
    fit(run, tmp_path)
    run.mesh, run.hooks = mesh, ()
    state = fit(run, tmp_path)
    for name in expected.params:
        got, want = (real_vocabulary(name, np.asarray(each[name])) for each in (state.params, expected.params))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-5, err_msg=name)


def test_a_changed_maths_field_is_refused(unbroken, text):
    workdir, _, _ = unbroken
    run = tiny.get_config(f'text={text}')
    run.model.rope_theta = 500.0
    with pytest.raises(ConfigError, match=r'config\.model\.rope_theta: 10000\.0 → 500\.0'):
        fit(run, workdir)


def test_diverging_run_stops_and_names_the_module(text, tmp_path):
    run = tiny.get_config(f'text={text}')
    run.optimizer.schedule.peak = 1e30
    run.optimizer.schedule.warmup = 0
    run.optimizer.clip = 0.0
    run.bad_steps = 3
    run.hooks = ()
    with pytest.raises(Diverged, match='3 steps in a row had a non-finite loss or gradient') as error:
        fit(run, tmp_path)
    assert 'the first non-finite output is that of stack.prefix.0.' in str(error.value)


def test_weights_of_another_run(unbroken, text, tmp_path):
    workdir, expected, _ = unbroken
    run = tiny.get_config(f'text={text},steps=1')
    run.origin.weights = str(workdir)
    run.optimizer.schedule.peak, run.optimizer.schedule.warmup, run.hooks = 0.0, 0, ()
    state = fit(run, tmp_path)
    assert_same_state(state.params, expected.params)


def test_wrong_vocabulary_and_batch_are_one_line(text, tmp_path):
    run = tiny.get_config(f'text={text}')
    run.model.vocab_size = 200
    with pytest.raises(ConfigError, match=r'ids up to 258 but model\.vocab_size is 200; set it to at least 259'):
        fit(run, tmp_path / 'vocab')
    run = tiny.get_config(f'text={text}')
    run.data.global_batch = 12
    with pytest.raises(ConfigError, match=r'12 rows are not divisible by stage x data x fsdp x expert = 8'):
        fit(run, tmp_path / 'batch')
    run.data.global_batch, run.mesh, run.model.layers = 8, Mesh(stage=2, fsdp=4), 2
    message = '8 rows do not divide into 4 equal microbatches over 4 devices; make the batch a multiple of 16'
    with pytest.raises(ConfigError, match=message):
        fit(run, tmp_path / 'microbatches')
    run.mesh, run.pipeline.microbatches = Mesh(stage=8, fsdp=1), 16
    with pytest.raises(ConfigError, match='8 rows do not divide into 16 equal microbatches; make the batch'):
        fit(run, tmp_path / 'microbatches')

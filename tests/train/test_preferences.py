"""Learning from judged answers, from the pages to held-out accuracy; log-probs of the reference beside or stored."""

import json
import shutil

import numpy as np
import pytest

from configs import preference, reward
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.sources import Labelled, Preferences
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.plan.plan import choices
from tpu_llm.train.frozen import Reference
from tpu_llm.train.loop import fit

pytestmark = pytest.mark.usefixtures('quick_compile')


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def column(workdir, name):
    return [line[name] for line in lines(workdir) if name in line]


def smoke(page, arg, steps=30):
    run = page.get_config(f'smoke,{arg}' if arg else 'smoke')
    run.steps, run.report, run.log_every = steps, False, 1
    return run


def tiny(arg):
    """Three steps of a model of one layer."""
    run = smoke(preference, arg, steps=3)
    run.model.layers, run.model.width, run.hooks[0].documents = 1, 32, 16
    run.optimizer.schedule.warmup = 1
    return run


def test_pages_validate_in_every_form():
    for method in preference.METHODS:
        for form in ('', 'smoke,', 'lora=4,'):
            validate(preference.get_config(f'{form}method={method}'))
        if method in preference.STORED:
            run = preference.get_config(f'stored,method={method}')
            validate(run)
            assert run.reference is None
    for kind in reward.KINDS:
        run = reward.get_config(f'kind={kind}')
        validate(run)
        assert isinstance(run.model, ScalarConfig)
        assert 'objective.chunk' not in choices(run), 'it has no logits to cut into chunks'
    assert 'objective.chunk' in choices(preference.get_config())


def test_pages_say_what_cannot_be():
    with pytest.raises(ConfigError, match='data= is learned by a model that can talk already; give model='):
        preference.get_config('data=a.jsonl')
    with pytest.raises(ConfigError, match='data= is judged by a model that can read already; give model='):
        reward.get_config('data=a.jsonl')
    with pytest.raises(ConfigError, match='method=kto reads no stored reference; take stored out, or use dpo, robust'):
        preference.get_config('method=kto,stored')
    with pytest.raises(ConfigError, match=r"unknown method 'ppo'"):
        preference.get_config('method=ppo')


def test_a_run_says_what_cannot_be(tmp_path):
    run = preference.get_config('smoke')
    run.reference = None
    with pytest.raises(ConfigError, match=r'objective DPO needs a frozen model; set reference=Reference\(\)'):
        validate(run)
    run = preference.get_config('smoke,method=orpo')
    run.reference = Reference()
    with pytest.raises(ConfigError, match='objective ORPO reads no frozen model; take reference out'):
        validate(run)
    run = reward.get_config('smoke')
    run.model = preference.get_config('smoke').model
    with pytest.raises(ConfigError, match='objective PairReward trains ScalarConfig, and model is DecoderConfig'):
        validate(run)
    run = preference.get_config('smoke')
    run.data.form = None
    with pytest.raises(ConfigError, match=r'objective DPO reads ScoredBatch, and data\.form = none gives Batch'):
        validate(run)
    run = preference.get_config('smoke')
    run.data.mixture = preference.get_config('smoke,method=kto').data.mixture
    said = "source 'answers' is of labelled examples, and objective DPO learns from preference examples"
    with pytest.raises(ConfigError, match=said):
        fit(run, tmp_path)


BAD = {
    'chosen and rejected are the same': (Preferences, {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}),
    "label is 'good'; write true": (Labelled, {'prompt': 'a', 'completion': 'b', 'label': 'good'}),
}


@pytest.mark.parametrize('said', BAD)
def test_a_bad_record_stops_the_run_and_is_named(said, tmp_path):
    kind, record = BAD[said]
    path = tmp_path / 'bad.jsonl'
    path.write_text(json.dumps(record))
    run = tiny('method=kto' if kind is Labelled else '')
    run.data.mixture.sources['answers'] = kind(paths=(str(path),), template='plain')
    with pytest.raises(ConfigError, match=f'bad.jsonl, line 1: {said}'):
        fit(run, tmp_path / 'run')


@pytest.fixture(scope='module')
def beside(tmp_path_factory):
    """A run with the reference beside the model that trains."""
    workdir = tmp_path_factory.mktemp('preferences') / 'beside'
    fit(tiny('method=dpo'), workdir)
    return workdir


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('preferences') / 'stored'
    fit(tiny('method=dpo,stored'), workdir)
    return workdir


def test_stored_is_as_beside(beside, stored):
    assert column(beside, 'loss')[0] == pytest.approx(np.log(2), abs=1e-5)
    for name in ('loss', 'reward_chosen', 'reward_rejected', 'grad_norm', 'heldout_loss', 'heldout_margin'):
        assert len(column(beside, name)) >= 1
        np.testing.assert_allclose(column(stored, name), column(beside, name), rtol=1e-3, atol=1e-4, err_msg=name)


def test_what_is_stored_may_be_deleted(stored, tmp_path):
    """A folder for the source, one for what is held out; what is there is not made again."""
    folders = sorted((stored / 'cache').iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith('reference-') for folder in folders)
    before = {folder.name: (folder / 'reference.bin').read_bytes() for folder in folders}
    losses = [column(stored, name) for name in ('loss', 'heldout_loss')]
    again = tmp_path / 'again'
    shutil.copytree(stored / 'cache', again / 'cache')
    shutil.rmtree(again / 'cache' / folders[0].name)
    kept = (again / 'cache' / folders[1].name / 'reference.bin').stat().st_mtime_ns
    fit(tiny('method=dpo,stored'), again)
    assert [column(again, name) for name in ('loss', 'heldout_loss')] == losses
    assert {f.name: (f / 'reference.bin').read_bytes() for f in (again / 'cache').iterdir()} == before
    assert (again / 'cache' / folders[1].name / 'reference.bin').stat().st_mtime_ns == kept


@pytest.mark.full
@pytest.mark.parametrize('arg', ['method=dpo', 'method=kto', 'method=orpo', 'lora=4'])
def test_the_smoke_run_learns_what_is_preferred(arg, tmp_path):
    fit(smoke(preference, arg), tmp_path)
    losses = column(tmp_path, 'heldout_loss')
    assert len(losses) == 3
    assert losses[-1] < column(tmp_path, 'loss')[0]
    assert column(tmp_path, 'heldout_accuracy')[-1] > 0.9


@pytest.mark.full
@pytest.mark.parametrize('kind', ['pairs', 'rankings', 'steps'])
def test_the_smoke_run_learns_what_is_good(kind, tmp_path):
    fit(smoke(reward, f'kind={kind}', 40), tmp_path)
    losses = column(tmp_path, 'loss')
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    if kind == 'pairs':
        assert column(tmp_path, 'heldout_accuracy')[-1] > 0.9
        assert column(tmp_path, 'heldout_brier')[-1] < 0.1

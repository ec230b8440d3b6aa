"""Where a run starts, and what may change when it starts again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm import config as config_lib
from tpu_llm.checkpoint import fence, manifest, resume
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.config import ConfigError, machine, schedule


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    source: str = 'books'
    workers: int = machine(0)


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    model: str = 'one'
    data: Data = dataclasses.field(default_factory=Data)
    width: int = 8
    steps: int = schedule(100)
    mesh: str = machine('1')


def save(start, workdir, step, config=None, tokenizer='abc'):
    about = manifest.describe(config or Config(), mesh={'data': 1}, tokenizer=tokenizer)
    return start(workdir).save(step, manifest=about)


@pytest.fixture
def choose(tmp_path, start):
    """`choose(parent=…, weights=…)` starts a run in `tmp_path/'run'`."""

    def chosen(config=None, tokenizer='abc', **origin):
        like = start(tmp_path / 'run').like()
        return resume.resume(tmp_path / 'run', like, Origin(**origin), config=config or Config(), tokenizer=tokenizer)

    return chosen


def test_its_own_checkpoint_comes_first(tmp_path, start, choose):
    own = save(start, tmp_path / 'run', 5)
    save(start, tmp_path / 'parent', 9)
    chosen = choose(parent=str(tmp_path / 'parent'))
    assert (chosen.kind, chosen.step, chosen.folder) == ('run', 5, own.folder(5))
    assert own.bits(chosen.arrays) == own.bits(own.state(5))
    np.testing.assert_array_equal(chosen.lanes['document'], [5, 15, 25])
    assert str(chosen) == f'continuing at step 5 from {own.folder(5)}'


def test_a_parent_continues_in_full(tmp_path, start, choose):
    parent = save(start, tmp_path / 'parent', 9)
    changed = Config(width=16, steps=200, data=Data(workers=3))
    chosen = choose(changed, parent=str(tmp_path / 'parent'))
    assert (chosen.kind, chosen.step) == ('parent', 9)
    assert parent.bits(chosen.arrays) == parent.bits(parent.state(9))
    np.testing.assert_array_equal(chosen.lanes['document'], [9, 19, 29])
    assert str(chosen) == f'branching off at step 9 from {parent.folder(9)}; the data goes on'


def test_a_parent_may_be_one_checkpoint(tmp_path, start, choose):
    about = manifest.describe(Config(), mesh={}, tokenizer='abc')
    parent = start(tmp_path / 'parent').save(1, 2, manifest=about)
    assert choose(parent=str(parent.folder(1))).step == 1


def test_other_data_starts_at_its_beginning(tmp_path, start, choose):
    parent = save(start, tmp_path / 'parent', 9)
    chosen = choose(Config(data=Data(source='code')), parent=str(tmp_path / 'parent'))
    assert (chosen.step, chosen.lanes) == (9, None)
    assert str(chosen) == f'branching off at step 9 from {parent.folder(9)}; the data starts at its beginning'


def test_given_weights_are_parameters_alone(tmp_path, start, choose):
    given = save(start, tmp_path / 'given', 9)
    chosen = choose(weights=str(tmp_path / 'given'))
    assert (chosen.kind, chosen.step, chosen.lanes) == ('weights', 0, None)
    assert chosen.arrays == {}  # who has the model reads them
    assert 'params.decoder.embed' in resume.open_weights(str(tmp_path / 'given'), 'one', 'abc').tensors
    assert str(chosen) == f'starting at step 0 with the parameters of {given.folder(9)}'


def test_scratch(choose):
    chosen = choose()
    assert (chosen.kind, chosen.step, chosen.arrays, chosen.lanes) == ('scratch', 0, {}, None)
    assert str(chosen) == 'starting at step 0 from scratch'


def test_a_damaged_parent_is_an_error(tmp_path, start, choose):
    (save(start, tmp_path / 'parent', 9).folder(9) / 'manifest.json').write_text('{}')
    with pytest.raises(CheckpointError, match=r'manifest.json has 2 of \d+ bytes'):
        choose(parent=str(tmp_path / 'parent'))


@pytest.mark.parametrize('field', ['parent', 'weights'])
def test_a_source_without_checkpoints_is_named(tmp_path, choose, field):
    with pytest.raises(ConfigError, match=f"{field}='/nowhere' holds no finished checkpoint"):
        choose(**{field: '/nowhere'})


def test_parent_and_weights_exclude_each_other():
    with pytest.raises(ConfigError, match=r"config: parent='a' and weights='b' exclude each other; give one"):
        config_lib.validate(Origin(parent='a', weights='b'))


@pytest.mark.parametrize('origin', ['run', 'parent', 'weights'])
def test_another_tokenizer_is_refused(tmp_path, start, choose, origin):
    source = save(start, tmp_path / origin, 1, tokenizer='abc')
    arguments = {} if origin == 'run' else {origin: str(tmp_path / origin)}
    with pytest.raises(ConfigError) as error:
        choose(tokenizer='xyz', **arguments)
    assert str(error.value).startswith(
        f'the tokenizer (fingerprint xyz) is not the one {source.folder(1)} was trained with (abc)'
    )


def test_a_parent_of_another_shape_is_refused(tmp_path, start, choose):
    run = start(tmp_path / 'parent')
    about = manifest.describe(Config(), mesh={}, tokenizer='abc')
    wide = run.state(1) | {'mask': jnp.ones(5)}
    run.store.save(1, wide, lanes=run.lanes(1), manifest=about, wait=True)
    with pytest.raises(ConfigError, match=r'mask is float32\[5\] there and bool\[2\] here; make the config'):
        choose(parent=str(tmp_path / 'parent'))


# ------------------------------------------------------------------------------------- the workdir's config


def test_the_first_start_records_its_config(tmp_path):
    assert resume.check_config(tmp_path, Config()) == []
    resume.record_config(fence.start(tmp_path), Config(), [])
    assert json.loads((tmp_path / 'config.json').read_text()) == config_lib.dump(Config())
    assert not (tmp_path / 'changes.jsonl').exists()


def test_changes_of_the_maths_are_refused_and_listed(tmp_path):
    resume.record_config(fence.start(tmp_path), Config(), [])
    with pytest.raises(ConfigError) as error:
        resume.check_config(tmp_path, Config(width=16, data=Data(source='code'), steps=7))
    assert str(error.value) == (
        f'{tmp_path} was started with another config, and this would change its numbers: '
        "config.data.source: 'books' → 'code'; config.width: 8 → 16; undo that, or use another --workdir"
    )


def test_changes_of_the_schedule_are_recorded_and_of_the_machine_free(tmp_path):
    resume.record_config(fence.start(tmp_path), Config(), [])
    for steps in (200, 300):
        config = Config(steps=steps, mesh=f'{steps}')
        changes = resume.check_config(tmp_path, config)
        held = fence.start(tmp_path)
        resume.record_config(held, config, changes)
    lines = [json.loads(line) for line in (tmp_path / 'changes.jsonl').read_text().splitlines()]
    assert [line['changes'] for line in lines] == [{'config.steps': [100, 200]}, {'config.steps': [200, 300]}]
    assert lines[-1]['start'] == held.token
    assert json.loads((tmp_path / 'config.json').read_text())['mesh'] == '300'


def test_a_superseded_start_records_nothing(tmp_path):
    older = fence.start(tmp_path)
    fence.start(tmp_path)
    with pytest.raises(fence.Superseded):
        resume.record_config(older, Config(), [])
    assert not (tmp_path / 'config.json').exists()


def test_a_broken_config_json_is_named(tmp_path):
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ConfigError, match=r'config.json is not JSON; bring it back'):
        resume.check_config(tmp_path, Config())


def test_manifest_says_where_it_comes_from():
    about = manifest.describe(Config(width=16), mesh={'data': 4, 'tensor': 2}, tokenizer='abc')
    assert about['config']['width'] == 16
    assert about['digest'] == config_lib.digest(Config(width=16))
    assert about['mesh'] == {'data': 4, 'tensor': 2}
    assert about['versions']['jax'] == jax.__version__
    assert set(about['versions']) >= {
        'python',
        'tpu_llm',
        'jaxlib',
        'flax',
        'optax',
        'orbax-checkpoint',
        'numpy',
    }
    assert json.loads(json.dumps(about)) == about

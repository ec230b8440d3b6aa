"""What stays: the newest few, every m-th step, the best; and nothing half-written."""

import math

import pytest
from etils import epath

from tpu_llm import config
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.checkpoint.retention import Checkpoints, kept


def checkpoint(step: int, token: str = '0001-aa', **metrics: float) -> Checkpoint:
    folder = epath.Path(f'/run/checkpoints/{step}.{token}')
    return Checkpoint(folder, step, token, processes=1, time='', metrics=metrics, checksums={})


LOSSES = {10: 4.0, 20: 1.0, 30: math.nan, 40: 3.0, 50: 2.0, 60: 5.0}
SAVED = [checkpoint(step, loss=loss) for step, loss in LOSSES.items()]


@pytest.mark.parametrize(
    ('rules', 'stays'),
    [
        ({'keep': 2}, [60, 50]),
        ({'keep': 1, 'keep_every': 30}, [60, 30]),
        ({'keep': 1, 'best': 'loss'}, [60, 20]),
        ({'keep': 1, 'best': 'other'}, [60]),
        ({'keep': 9}, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_rules(rules, stays):
    assert [c.step for c in kept(SAVED, Checkpoints(**rules))] == stays


def test_the_later_start_counts_as_newer_and_replaces_the_same_step():
    saved = [checkpoint(10, '0001-aa'), checkpoint(20, '0001-aa'), checkpoint(10, '0002-aa')]
    stays = kept(saved, Checkpoints(keep=2))
    assert [(c.step, c.token) for c in stays] == [(10, '0002-aa'), (20, '0001-aa')]


@pytest.mark.parametrize(('name', 'value'), [('every', 0), ('keep', 0), ('keep_every', -1)])
def test_bad_rules_are_named(name, value):
    with pytest.raises(config.ConfigError, match=f'config: {name} is {value}; it is at least'):
        config.validate(Checkpoints(**{name: value}))


def test_a_run_keeps_by_the_rules(tmp_path, start):
    run = start(tmp_path, keep=2, keep_every=4, best='loss')
    for step, loss in enumerate([5.0, 1.0, 3.0, 4.0, 3.0, 2.0, 6.0], start=1):
        run.save(step, metrics={'loss': loss})
    assert run.store.steps() == [2, 4, 6, 7]


def test_what_an_older_start_left_half_written_goes(tmp_path, start):
    older = start(tmp_path).save(1, 2)
    (older.folder(2) / 'COMMIT.json').unlink()
    newer = start(tmp_path)
    half = tmp_path / 'checkpoints' / '00000009.9999-abcdef'  # of a start yet to come: not ours to remove
    half.mkdir()
    newer.save(3)
    names = sorted(path.name.split('.')[0] for path in (tmp_path / 'checkpoints').iterdir())
    assert names == ['00000001', '00000003', '00000009']

"""A run that trains what predicts further tokens, and runs that would leave it untrained."""

import json

import pytest
import tiny

from tpu_llm.config import ConfigError, validate
from tpu_llm.objectives.ahead import Ahead
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.train.loop import fit

pytestmark = pytest.mark.usefixtures('quick_compile')


def make_run(tmp_path, *, ahead=1, objective=None):
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/a.txt').write_text('abcdefgh' * 400)
    run = tiny.get_config(f'text={tmp_path}/text,steps=20,every=100,experts=4')
    run.model.predict_ahead, run.objective, run.model.dropout = ahead, objective or Ahead(), None
    return run


@pytest.mark.full
def test_further_tokens_are_learned_with_the_next(tmp_path):
    fit(make_run(tmp_path), tmp_path / 'run')
    lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    for name in ('nll', 'ahead_1_nll'):
        values = [line[name] for line in lines if name in line]
        assert values[-1] < 0.7 * values[0], name
    right = [line['ahead_1_right'] for line in lines if 'ahead_1_right' in line]
    assert right[0] < 0.3 < right[-1] <= 1.0


@pytest.mark.parametrize(
    ('ahead', 'objective', 'message'),
    [
        (0, Ahead(), r'objective Ahead trains what predicts further tokens, and model\.predict_ahead = 0; set it to 1'),
        (2, NextToken(), r'model\.predict_ahead = 2, which objective NextToken does not train; use Ahead, or set it'),
    ],
)
def test_model_and_objective_go_together(ahead, objective, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        validate(make_run(tmp_path, ahead=ahead, objective=objective))

"""Rewards that are checked against the prompt's record."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from tpu_llm import config
from tpu_llm.config import ConfigError
from tpu_llm.evals.sandboxed import Limits
from tpu_llm.rl.lengths import SoftOverlong, TargetLength
from tpu_llm.rl.rewards import Reward, Sample
from tpu_llm.rl.unit_tests import UnitTests
from tpu_llm.rl.verify import ExactMatch, Format, JsonSchema, Numeric

SCHEMA = {'type': 'object', 'properties': {'age': {'type': 'integer'}}, 'required': ['age']}


def sample(response: str, tokens: int = 4, **record: Any) -> Sample:
    return Sample(prompt='?', response=response, record=record, finished=True, ids=np.zeros(9, np.int32), tokens=tokens)


def worth(reward: Any, *samples: Sample) -> list[float]:
    config.validate(reward)
    return list(reward.open(None)(samples))


@pytest.mark.parametrize(
    ('reward', 'response', 'value'),
    [
        (ExactMatch(), ' Paris\n', 1),
        (ExactMatch(), 'paris', 0),
        (ExactMatch(ignore=('case',)), 'paris', 1),
        (ExactMatch(ignore=('case', 'punctuation', 'articles', 'space')), 'The  Paris!', 1),
        (ExactMatch(ignore=('articles',)), 'Theparis', 0),
        (ExactMatch(marked=True), 'It is \\boxed{Paris}.', 1),
        (ExactMatch(marked=True), 'Paris', 0),
    ],
)
def test_exact_match(reward, response, value):
    assert worth(reward, sample(response, answer='Paris')) == [value]


def test_exact_match_takes_any_of_a_list_and_numbers_as_they_are_written():
    assert worth(ExactMatch(), sample('b', answer=['a', 'b']), sample('12', answer=12)) == [1, 1]
    assert worth(ExactMatch(field='gold'), sample('e\u0301', gold='é')) == [1]  # one letter, written two ways


@pytest.mark.parametrize(
    ('reward', 'response', 'answer', 'value'),
    [
        (Numeric(), 'There are 3 boxes of 4, so 12.', '12', 1),
        (Numeric(), 'There are 3 boxes of 4, so 13.', 12, 0),
        (Numeric(), 'no idea', 12, 0),
        (Numeric(), '#### 1,200\nChecked in 3 ways.', 'so\n#### 1200', 1),
        (Numeric(marked=True), '12', 12, 0),
        (Numeric(marked=True), '\\boxed{12}', 12, 1),
        (Numeric(), '\\boxed{\\frac{1}{2}}', '0.5', 1),
        (Numeric(), '36 km/h', '10 m/s', 1),
        (Numeric(), '10', '10 m/s', 1),
        (Numeric(unit='required'), '10', '10 m/s', 0),
        (Numeric(), '3.14', '3.14159', 0),
        (Numeric(relative=0.001), '3.14', '3.14159', 1),
        (Numeric(absolute=0.5), '12.5', 12, 1),
        (Numeric(), '2', [1, 2], 1),
    ],
)
def test_numeric(reward, response, answer, value):
    assert worth(reward, sample(response, answer=answer)) == [value]


def test_format():
    pattern = r'<think>.*</think>\s*<answer>.*</answer>'
    good, bad = sample('<think>a\nb</think>\n<answer>1</answer>\n'), sample('x <think></think><answer></answer>')
    assert worth(Format(pattern=pattern), good, bad) == [1, 0]
    assert worth(Format(pattern=pattern, anywhere=True), good, bad) == [1, 1]
    with pytest.raises(ConfigError, match=r"pattern is '\('.*missing \)"):
        config.validate(Format(pattern='('))


def test_json_schema(tmp_path):
    responses = ['{"age": 3}', 'Here:\n```json\n{"age": 3}\n```', '{"age": "3"}', '{"age": NaN}', '{', '[' * 100_000]
    values = [1, 1, 0, 0, 0, 0]
    samples = [sample(response, schema=SCHEMA) for response in responses]
    assert worth(JsonSchema(), *samples) == values
    assert worth(JsonSchema(schema=json.dumps(SCHEMA)), *samples) == values
    (tmp_path / 'schema.json').write_text(json.dumps(SCHEMA))
    assert worth(JsonSchema(schema=f'{tmp_path}/schema.json'), *samples) == values


@pytest.mark.parametrize(
    ('schema', 'said'), [('{', 'no JSON'), ('{"type": 3}', 'the schema is none'), ('none.json', 'there is no schema')]
)
def test_a_bad_schema_is_refused_before_the_run(schema, said):
    with pytest.raises(ConfigError, match=said):
        config.validate(JsonSchema(schema=schema))


def test_a_config_with_a_schema_is_read_again():
    reward = JsonSchema(schema=json.dumps(SCHEMA))
    assert config.load(config.dump(reward)) == reward


@pytest.mark.parametrize('reward', [ExactMatch(), Numeric(), JsonSchema(field='answer')])
def test_a_record_without_the_field_is_named(reward: Reward):
    with pytest.raises(ValueError, match=r"no 'answer' \(its fields are 'gold'\)"):
        reward.open(None)([sample('1', gold='1')])


def test_an_answer_without_a_number_is_named():
    with pytest.raises(ValueError, match=r"'answer' is 'many', which holds no number"):
        Numeric().open(None)([sample('1', answer='many')])


def test_soft_overlong_is_the_papers_equation():
    lengths = [0, 80, 81, 90, 100, 120]
    given = worth(SoftOverlong(most=100, cache=20), *(sample('', tokens=n) for n in lengths))
    assert given == [0, 0, -1 / 20, -10 / 20, -1, -1]
    with pytest.raises(ConfigError, match='cache = 0'):
        config.validate(SoftOverlong(most=100, cache=0))


def test_target_length():
    given = worth(TargetLength(target=10, slack=2), *(sample('', tokens=n) for n in (10, 12, 8, 13, 5, 99)))
    assert np.allclose(given, [0, 0, 0, -0.1, -0.3, -1])
    with pytest.raises(ConfigError, match='target = 0'):
        config.validate(TargetLength(target=0))


def test_unit_tests_give_the_share_that_passes():
    tests = ['assert f(1) == 2', 'assert f(2) == 3']
    good, half, none = '```python\ndef f(x): return x + 1\n```', 'def f(x): return 2 * x', 'I cannot.'
    samples = [sample(response, tests=tests) for response in (good, half, none)]
    reward = UnitTests(limits=Limits(seconds=2.0, contained=False), workers=2)
    assert worth(reward, *samples) == [1, 0.5, 0]
    assert worth(dataclasses.replace(reward, whole=True), *samples) == [1, 0, 0]
    with pytest.raises(ValueError, match="no 'tests'"):
        worth(reward, sample(good))

"""What a panel does with rewards that fail: the sample is named, and stops the run or is left out."""

import json
import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.data.prompts import Prompts
from tpu_llm.rl.rewards import Function, Panel, RewardError, Sample, check
from tpu_llm.rl.unit_tests import UnitTests
from tpu_llm.rl.verify import ExactMatch, JsonSchema, Numeric


def samples(*responses: str) -> list[Sample]:
    return [
        Sample(
            prompt='how many?',
            response=r,
            record={'answer': 4},
            finished=True,
            ids=np.zeros(2, np.int32),
            tokens=1,
            where=lambda: 'p.jsonl, line 3',
        )
        for r in responses
    ]


def panel(*rewards: Any, on_error: Any = 'stop', timeout: float = 5.0, first: Any = None) -> Panel:
    return Panel(rewards, None, on_error=on_error, timeout=timeout, first=first, skips='--config.skip')


def raises(sample: Sample) -> float:
    if sample.response == 'bad':
        raise KeyError('answer')
    return 1.0


def reads(sample: Sample) -> float:
    return json.loads(sample.response) if sample.response == 'bad' else 1.0  # fails in the standard library


def is_none(sample: Sample) -> Any:
    return None if sample.response == 'bad' else 1.0


def is_nan(sample: Sample) -> float:
    return math.nan if sample.response == 'bad' else 1.0


def hangs(sample: Sample) -> float:
    while sample.response == 'bad':
        time.sleep(0.01)
    return 1.0


def refuses(sample: Sample) -> float:
    raise ConfigError('set it up first')


def two(sample: Sample) -> Any:
    return [1.0, 2.0]


def line(function: Any, further: int) -> str:
    return f'test_rewards_panel.py:{function.__code__.co_firstlineno + further}'


OR_SKIP = ', or set --config.skip'
SAYS = [
    (raises, f"KeyError: 'answer' at {line(raises, 2)}; mend it{OR_SKIP}"),
    (reads, f'JSONDecodeError: Expecting value: line 1 column 1 (char 0) at {line(reads, 1)}; mend it{OR_SKIP}'),
    (is_nan, f'nan; give a finite number{OR_SKIP}'),
    (is_none, 'None; did it return a number?'),
    (hangs, f'no answer within 0.2 s a sample; mend it, raise its timeout{OR_SKIP}'),
]


@pytest.mark.parametrize(('call', 'said'), SAYS)
def test_stop_names_the_sample(call, said):
    with pytest.raises(RewardError) as error:
        panel(Function(call=call), timeout=0.2)(samples('good', 'bad', 'good'))
    place = "p.jsonl, line 3: reward 'function', response 'bad' to 'how many?'"
    assert str(error.value) == f'{place}: {said}'


@pytest.mark.parametrize(('call', 'said'), SAYS)
def test_skip_leaves_the_sample_out_and_says_so(call, said, caplog):
    judged = panel(Function(call=call), ExactMatch(weight=2.0), on_error='skip', timeout=0.2)(
        samples('4', 'bad', 'good', 'bad')
    )
    np.testing.assert_array_equal(judged.failed, [False, True, False, True])
    np.testing.assert_array_equal(judged.total, [3.0, np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(judged.each['exact'], [1, 0, 0, 0])
    place = "p.jsonl, line 3: reward 'function', response 'bad' to 'how many?'"
    told = 'left out (of each cause the first is named, and all are counted)'
    assert [record.message for record in caplog.records] == [f'{told}: {place}: {said.removesuffix(OR_SKIP)}']


def test_each_cause_is_told_once(caplog):
    def fails(sample: Sample) -> Any:
        if sample.response == 'none':
            return None
        return 1 / 0 if sample.response == 'zero' else int(sample.response)

    judge = panel(Function(call=fails), on_error='skip')
    assert judge(samples('a', 'zero', 'b', 'none', '4', 'zero')).failed.tolist() == [True] * 4 + [False, True]
    assert judge(samples('c', 'none')).failed.all()
    said = ("literal for int() with base 10: 'a' at ", 'ZeroDivisionError: division by zero at ', ': None; did')
    assert len(caplog.records) == len(said)
    assert all(part in record.message for part, record in zip(said, caplog.records, strict=True))


def test_none_for_all_samples_is_no_number():
    class Forgetful:
        name, weight = 'forgetful', 1.0

        def open(self, surroundings: Any) -> Any:
            return lambda samples: None

    with pytest.raises(RewardError, match=r"'a' to 'how many\?': None; did it return a number\?"):
        panel(Forgetful())(samples('a'))


def test_a_weighted_sum_and_each_alone():
    judged = panel(ExactMatch(weight=0.5), Numeric(weight=-2.0))(samples('4', 'it is 4', '5'))
    np.testing.assert_array_equal(judged.each['exact'], [1, 0, 0])
    np.testing.assert_array_equal(judged.each['numeric'], [1, 1, 0])
    np.testing.assert_array_equal(judged.total, [-1.5, -2, 0])


def test_what_is_wrong_with_the_setup_always_stops():
    with pytest.raises(ConfigError, match='set it up first'):
        panel(Function(call=refuses), on_error='skip')(samples('a', 'b'))


def test_two_numbers_for_a_sample_are_refused():
    with pytest.raises(RewardError, match=r'\[1, 2\] numbers for 1 samples'):
        panel(Function(call=two))(samples('a'))


def asked(tmp_path, record: str) -> Any:
    (tmp_path / 'p.jsonl').write_text(f'\n{record}\n')
    return Prompts(paths=(str(tmp_path / 'p.jsonl'),)).open()


@pytest.mark.parametrize(
    ('reward', 'record', 'said'),
    [
        (Numeric(), '{"prompt": "?"}', r"reward 'numeric': the record of this prompt has no 'answer' \(its fields are"),
        (Numeric(), '{"prompt": "?", "answer": "x"}', "reward 'numeric': the record's 'answer' is 'x', which holds no"),
        (ExactMatch(), '{"prompt": "?"}', "reward 'exact': the record of this prompt has no 'answer'"),
        (JsonSchema(), '{"prompt": "?"}', "reward 'json': the record of this prompt has no 'schema'"),
        (UnitTests(), '{"prompt": "?"}', "reward 'tests': the record of this prompt has no 'tests'"),
    ],
)
def test_what_no_answer_could_be_judged_by_is_refused_at_the_start(tmp_path, reward, record, said):
    documents = [asked(tmp_path, record)]
    with pytest.raises(ConfigError, match=f'p.jsonl, line 2: {said}'):
        check([reward], documents)
    check([reward], documents, 'skip')


def test_a_record_with_all_that_is_read_is_let_pass(tmp_path):
    record = '{"prompt": "?", "answer": [4, "3/4"], "schema": {}, "tests": ["assert True"]}'
    check([Numeric(), ExactMatch(), JsonSchema(), UnitTests(), Function(call=two)], [asked(tmp_path, record)])


def test_names_are_the_metrics_so_they_differ():
    with pytest.raises(ConfigError, match='rewards have the names exact, exact'):
        panel(ExactMatch(), ExactMatch())
    with pytest.raises(ConfigError, match='rewards is empty'):
        panel()


def test_other_hosts_hear_what_the_first_one_said():
    heard = []

    def first(text: str) -> str:
        heard.append(text)
        return text

    judged = panel(ExactMatch(), first=first)(samples('4', '5'))
    np.testing.assert_array_equal(judged.total, [1, 0])
    assert heard == ['{"values": [1.0, 0.0]}']
    with pytest.raises(RewardError, match='no such mind'):
        panel(ExactMatch(), first=lambda text: '{"error": "no such mind"}')(samples('4'))


HANGING = """
import time
import numpy as np
from tpu_llm.rl.rewards import Function, Panel, Sample
def hangs(sample):
    while True: time.sleep(0.01)
one = Sample(prompt='', response='', record={}, finished=True, ids=np.zeros(2, np.int32), tokens=1)
Panel([Function(call=hangs)], None, on_error='stop', timeout=0.2)([one])
"""


def test_a_process_ends_though_a_reward_hangs():
    ended = subprocess.run([sys.executable, '-c', HANGING], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert 'no answer within 0.2 s' in ended.stderr

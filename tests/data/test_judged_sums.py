"""Answers to sums: right and faulty ones, as every kind of example."""

import collections
import functools

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.data.examples import count_texts
from tpu_llm.data.judged_sums import JudgedSums
from tpu_llm.data.sums import Sums
from tpu_llm.data.tokenizer import Bytes

TOKENIZER = Bytes().make((), '')


def answers(pairs):
    """What is trained on of each text, and its values."""
    found = []
    for text in range(count_texts(pairs)):
        own = pairs[pairs['text'] == text]
        said = TOKENIZER.decode([int(i) for i in own['target'][own['weight'] > 0] if i != TOKENIZER.eos])
        found.append((said, own['value'][own['mark'] > 0].tolist()))
    return found


@functools.cache
def opened(**options):
    return JudgedSums(split='train', **options).open().encoded(TOKENIZER)


def read(number, **options):
    docs = opened(**options)
    a, b = map(int, docs.name(number).split(' + '))
    return a, b, answers(docs[number].pairs)


@pytest.mark.parametrize('number', [0, 5, 4321])
def test_what_is_preferred(number):
    a, b, ((good, values), (wrong, _)) = read(number)
    assert good == f'{a} + {b} = {a + b}.'
    assert values == [0.0]
    said = int(wrong.removesuffix('.').rpartition(' ')[2])
    assert 0 < abs(said - (a + b)) < 10
    assert said >= 0
    _, _, (_, (terse, _)) = read(number, fault='terse')
    assert terse == f'{a + b}.'
    _, _, ranking = read(number, kind='ranked')
    assert [text for text, _ in ranking] == [good, terse, wrong]


@pytest.mark.parametrize('kind', ['labelled', 'rated'])
def test_half_of_single_answers_are_good(kind):
    seen = collections.Counter()
    for number in range(100):
        a, b, ((said, (value,)),) = read(number, kind=kind)
        assert (said == f'{a} + {b} = {a + b}.') == (value > 0)
        seen[value] += 1
    assert set(seen) == {1.0, -1.0}
    assert 35 < seen[1.0] < 65


def test_steps_are_judged_one_by_one():
    kinds = collections.Counter()
    for number in range(100):
        a, b, ((said, values),) = read(number, kind='steps')
        right = [f'It ends in {(a + b) % 10}.' in said, f'Before it is {(a + b) // 10}.' in said]
        assert values == [1.0 if r else -1.0 for r in right]
        kinds[tuple(right)] += 1
    assert len(kinds) == 4


def test_the_split_is_that_of_the_questions():
    for split in ('train', 'heldout'):
        judged, plain = JudgedSums(split=split, digits=1).open(), Sums(split=split, digits=1).open()
        assert [judged.name(i) for i in range(len(judged))] == [plain.name(i) for i in range(len(plain))]
    prints = {JudgedSums(split='train', kind=kind).open().fingerprint for kind in ('ranked', 'rated')}
    assert len(prints) == 2
    assert '0 + ' in JudgedSums(split='train').open()[0].text
    with pytest.raises(ConfigError, match='digits is 4; write 1, 2 or 3'):
        JudgedSums(split='train', digits=4).validate()

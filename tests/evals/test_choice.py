"""Multiple choice under a model whose log-probs are a table: each way to normalise takes another choice."""

import math

import pytest
from subjects import Table

from tpu_llm.evals.catalogue import KINDS
from tpu_llm.evals.task import read

HEAD = 'kind: choice\nabout: x\nprompt: "Q{q}:"\nunconditional: "A:"\n---\n'
ROW = '{{"q": {}, "choices": ["ab", "cdefgh", "ééé", "i"], "answer": {}}}\n'

# Choices of 2, 6, 3 and 1 characters; 2, 6, 6 and 1 bytes. With the space, 3, 7, 4 and 2; in tokens of 2: 2, 4, 2, 1.
BEHIND = {' ab': -2.0, ' cdefgh': -3.0, ' ééé': -3.3, ' i': -1.5}
ANYWAY = {' ab': -4.0, ' cdefgh': -3.1, ' ééé': -3.4, ' i': -1.0}


def log_prob(context, continuation):
    return (ANYWAY if context == 'A:' else BEHIND)[continuation]


@pytest.fixture
def outcome(tmp_path):
    path = tmp_path / 'a.task'
    path.write_text(HEAD + ''.join(ROW.format(q, answer) for q, answer in enumerate([0, 1, 2, 3, 3])))
    task, subject = read(path, KINDS), Table(log_prob, width=2)
    return task.form.outcome(subject, task, 0), subject


def test_each_way_takes_its_choice(outcome):
    found, _ = outcome
    # Likeliest: i. A token: −1, −0.75, −1.65, −1.5. A byte: −1, −0.5, −0.55, −1.5. PMI: 2, 0.1, 0.1, −0.5.
    chosen = {'accuracy': 3, 'accuracy_tokens': 1, 'accuracy_bytes': 1, 'accuracy_pmi': 0}
    assert all(sample['chosen'] == chosen for sample in found.samples)
    assert [sample['wanted'] for sample in found.samples] == [0, 1, 2, 3, 3]
    assert found.samples[0]['choices'] == ['ab', 'cdefgh', 'ééé', 'i']
    right = {name: found.metrics[name].value for name in chosen}
    assert right == {'accuracy': 2 / 5, 'accuracy_tokens': 1 / 5, 'accuracy_bytes': 1 / 5, 'accuracy_pmi': 1 / 5}


def test_probability_and_bits(outcome):
    found, _ = outcome
    total = sum(map(math.exp, BEHIND.values()))
    each = [math.exp(-2.0), math.exp(-3.0), math.exp(-3.3), math.exp(-1.5), math.exp(-1.5)]
    assert found.metrics['probability'].value == pytest.approx(sum(each) / total / 5)
    bits = (2.0 + 3.0 + 3.3 + 1.5 + 1.5) / math.log(2) / (2 + 6 + 6 + 1 + 1)
    assert found.metrics['answer_bits'].value == pytest.approx(bits)


def test_nothing_is_asked_twice(outcome):
    """The choices alone are asked once, though every row has them."""
    _, subject = outcome
    assert len(subject.asked) == len(set(subject.asked)) == 5 * 4 + 4
    assert ('Q0:', ' ab') in subject.asked
    assert ('A:', ' ab') in subject.asked


def test_of_equals_the_first_is_taken(tmp_path):
    path = tmp_path / 'a.task'
    path.write_text(HEAD + ROW.format(0, 0))
    task = read(path, KINDS)
    found = task.form.outcome(Table(), task, 0)
    assert set(found.samples[0]['chosen'].values()) == {0}
    assert found.metrics['probability'].value == pytest.approx(1 / 4)

"""Metrics of texts, by hand and against the packages that they are of."""

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from subjects import Table

from tpu_llm.evals.catalogue import KINDS
from tpu_llm.evals.measures import Measured, estimate
from tpu_llm.evals.task import read
from tpu_llm.evals.text_metrics import METRICS, Leniency, corpus_statistics, exact, f1, numeric, rouge

STRICT = Leniency()
LENIENT = Leniency(ignore=('case', 'space', 'punctuation', 'articles'))

SAID = ['the cat sat on the mat', 'a dog barked', 'it rains in spring and summer', '']
WANTED = [
    ['the cat is on the mat', 'there is a cat on the mat'],
    ['the dog barked loudly'],
    ['it rains in spring and in summer', 'in spring it rains', 'rain'],
    ['nothing was said'],
]


@pytest.mark.parametrize(
    ('said', 'wanted', 'leniency', 'equal'),
    [
        (' Paris ', 'Paris', STRICT, 1),
        ('paris', 'Paris', STRICT, 0),
        ('The  Eiffel Tower!', 'eiffel tower', LENIENT, 1),
        ('Cafe\u0301', 'Caf\u00e9', STRICT, 1),
        ('It is \\boxed{Paris}, surely', 'Paris', STRICT, 1),
        ('so\n#### 12', '12', STRICT, 1),
        ('', '', STRICT, 1),
    ],
)
def test_exact(said, wanted, leniency, equal):
    assert exact(said, wanted, leniency) == equal


@pytest.mark.parametrize(
    ('said', 'wanted', 'leniency', 'equal'),
    [
        ('12 + 34 = 46.', '46', STRICT, 1),
        ('46, and not 45', '46', STRICT, 0),
        ('1.5 km', '1500 m', STRICT, 1),
        ('about 3.1', '3', Leniency(relative=0.05), 1),
        ('about 3.1', '3', Leniency(absolute=0.05), 0),
        ('none', '3', STRICT, 0),
    ],
)
def test_numeric(said, wanted, leniency, equal):
    assert numeric(said, wanted, leniency) == equal


@pytest.mark.parametrize(
    ('said', 'wanted', 'value'),
    [
        ('the cat sat', 'cat sat down', 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),  # 'the' is ignored
        ('a b b', 'b b b c', 2 * 2 / (2 + 4)),
        ('x', 'y', 0),
        ('', '', 1),
        ('x', '', 0),
    ],
)
def test_f1(said, wanted, value):
    assert f1(said, wanted, LENIENT) == pytest.approx(value)


@pytest.mark.parametrize('kind', ['rouge1', 'rouge2', 'rougeL'])
def test_rouge_is_that_of_the_package(kind):
    scorer = rouge_scorer.RougeScorer([kind])
    for said, wanted in zip(SAID, WANTED, strict=True):
        assert rouge(kind, said, wanted[0], STRICT) == scorer.score(wanted[0], said)[kind].fmeasure
    # Five of six words in order, of six: 'is' for 'sat'.
    assert rouge('rougeL', SAID[0], WANTED[0][0], STRICT) == pytest.approx(5 / 6)


@pytest.mark.parametrize(('name', 'metric'), [('bleu', BLEU(force=True)), ('chrf', CHRF())])
def test_corpora_are_scored_as_the_package_does(name, metric):
    """Also of rows that were drawn twice, and of unequally many references."""
    statistics = corpus_statistics(name, SAID, WANTED)
    references = [[row[at] if at < len(row) else None for row in WANTED] for at in range(3)]
    measured = Measured(statistics, name)
    assert measured.value == pytest.approx(metric.corpus_score(SAID, references).score)
    drawn = [0, 2, 2, 3]
    again = [[row[i] for i in drawn] for row in references]
    expected = metric.corpus_score([SAID[i] for i in drawn], again).score
    assert measured.drawn(np.array([[1.0, 0.0, 2.0, 1.0]])) == pytest.approx([expected])
    found = estimate(measured)
    assert found.low < found.value < found.high


def test_bleu_by_hand():
    """'a b c d e' for 'a b c d x': 4/5, 3/4, 2/3 and 1/2 of its n-grams, as long: the root of the product."""
    value = Measured(corpus_statistics('bleu', ['a b c d e'], [['a b c d x']]), 'bleu').value
    assert value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_a_task_is_scored_by_its_best_answer(tmp_path):
    path = tmp_path / 'a.task'
    path.write_text(
        f'kind: generative\nabout: x\nprompt: "{{q}}"\nmetrics: [{", ".join(METRICS)}]\nmax_new_tokens: 5\n'
        'ignore: [case]\nstop: ["\\n", "."]\n---\n'
        '{"q": "a", "answer": ["11", "The 12"]}\n{"q": "b", "answer": 7}\n'
    )
    task, subject = read(path, KINDS), Table(says=lambda prompt, number: {'a': ' the 12', 'b': ' 8'}[prompt])
    found = task.form.outcome(subject, task, 0)
    values = {name: each.value for name, each in found.metrics.items()}
    assert list(values) == list(METRICS)
    for name in ('exact', 'numeric', 'f1', 'rouge1', 'rougeL'):
        assert values[name] == 0.5
    assert values['chrf'] > 0
    (ask,) = subject.asks
    assert (ask.max_new_tokens, ask.stop, ask.temperature, ask.times) == (5, ('\n', '.'), 0.0, 1)
    assert found.samples[1] == {'asked': 'b', 'said': ' 8', 'wanted': ['7']}

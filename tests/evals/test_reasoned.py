"""Strategies on tasks: from a file to a score."""

import json

import pytest
from subjects import Table

from tpu_llm.config import ConfigError
from tpu_llm.evals import catalogue, task

HEAD = 'kind: reasoned\nabout: sums\nstrategy: {}\nreads: number\nmax_new_tokens: 8\n{}---\n'
ROWS = [
    {'example': True, 'question': '1 + 1?', 'answer': 2, 'reasoning': 'One more is 2.', 'parts': [['One?', '1']]},
    {'question': '2 + 2?', 'answer': [4, '4.0']},
    {'question': '2 + 3?', 'answer': '5 km'},
    {'question': '3 + 3?', 'answer': 6},
]


def read(folder, strategy, more='', rows=ROWS):
    file = folder / 'sums.task'
    file.write_text(HEAD.format(strategy, more) + '\n'.join(map(json.dumps, rows)))
    return task.read(file, catalogue.KINDS)


def test_a_chain_of_thought_is_scored_on_a_task(tmp_path):
    said = {'2 + 2?\nA:': ' So it is 4.', '2 + 3?\nA:': ' The answer is 5000 m.', '3 + 3?\nA:': ' Hm.'}
    subject = Table(says=lambda prompt, number: said[prompt.rpartition('Q: ')[2]])
    made = read(tmp_path, 'chain-of-thought')
    outcome = made.form.outcome(subject, made, 1)
    assert {name: each.value for name, each in outcome.metrics.items()} == pytest.approx(
        {'accuracy': 2 / 3, 'answered': 2 / 3}
    )
    assert [sample['answer'] for sample in outcome.samples] == ['4', '5000 m', None]
    with pytest.raises(ConfigError, match='ChainOfThought shows examples, and there are none'):
        made.form.outcome(subject, made, 0)


def test_votes_and_options_are_of_the_head(tmp_path):
    made = read(tmp_path, 'zero-shot', 'votes: 5\ntemperature: 0.4\noptions: {question: "{question}!", stop: ["!"]}\n')
    subject = Table(says=lambda prompt, number: ' 4')
    outcome = made.form.outcome(subject, made, 0)
    assert [ask.temperature for ask in subject.asks] == [0.4]
    assert subject.asks[0].stop == ('!',)
    assert outcome.samples[0]['votes'] == {'4': 5}
    assert outcome.metrics['accuracy'].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ('strategy', 'more', 'row', 'told'),
    [
        ('few-shots', '', {}, r"sums\.task line 3: strategy is 'few-shots' \(did you mean 'few-shot'\?\); there are"),
        ('zero-shot', 'votes: 0\n', {}, 'line 6: votes is 0; it is at least 1'),
        ('tree-of-thoughts', 'options: {dept: 3}\n', {}, r"line 6: options has 'dept' \(did you mean 'depth'\?\)"),
        ('tree-of-thoughts', 'options: {depth: 0}\n', {}, 'line 6: options: depth is 0; it is at least 1'),
        ('zero-shot', '', {'answer': None}, "line 8: field 'answer' is None"),
        ('zero-shot', '', {'example': True, 'parts': ['a']}, r"line 8: field 'parts' is \['a'\]; write \[\[question"),
    ],
)
def test_a_file_that_cannot_be_asked_names_the_line(tmp_path, strategy, more, row, told):
    rows = [ROWS[1], {'question': '?', 'answer': 1} | row] if row else ROWS
    told = told.replace('line 8', f'line {8 + more.count(chr(10))}')
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, strategy, more, rows)

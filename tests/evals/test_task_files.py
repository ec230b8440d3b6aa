"""Tasks as files: what is read, what is asked, and what is wrong with a file, in one line."""

import json

import pytest

from tpu_llm.config import ConfigError
from tpu_llm.evals import catalogue, made_tasks
from tpu_llm.evals.catalogue import KINDS
from tpu_llm.evals.task import fill, read

CHOICE = """kind: choice
about: Two sums.
prompt: '{question} ='
separator: "\\n"
---
{"example": true, "question": "1 + 1", "choices": ["2", "3"], "answer": 0}

{"question": "2 + 3", "choices": ["4", "5"], "answer": 1}
{"question": "4 + 4", "choices": ["8", "9"], "answer": 0}
"""


@pytest.fixture
def written(tmp_path):
    """The task in a file of that text."""

    def write(text, name='a'):
        path = tmp_path / f'{name}.task'
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read(path, KINDS)

    return write


def test_a_task_is_read(written):
    task = written(CHOICE)
    assert (task.name, task.form.kind, task.form.about) == ('a', 'choice', 'Two sums.')
    assert [row.line for row in task.rows] == [8, 9]
    assert [row.fields['question'] for row in task.examples] == ['1 + 1']


def test_examples_stand_before_the_question(written):
    task = written(CHOICE)
    assert task.prompts(0) == ['2 + 3 =', '4 + 4 =']
    assert task.prompts(1) == ['1 + 1 = 2\n2 + 3 =', '1 + 1 = 2\n4 + 4 =']
    opened = written(CHOICE.replace('---', 'opening: "Add.\\n"\n---'))
    assert opened.prompts(1)[0] == 'Add.\n1 + 1 = 2\n2 + 3 ='
    with pytest.raises(ConfigError, match=r'^task a has 1 examples, and shots = 2; ask for fewer, or mark more rows'):
        task.prompts(2)


def test_only_names_in_braces_are_places():
    assert fill('{a} {"b": {b}} {} { a }', {'a': 1, 'b': '{a}'}) == '1 {"b": {a}} {} { a }'


def test_what_changes_the_scores_changes_the_fingerprint(written):
    task = written(CHOICE)
    assert written(CHOICE.replace('\n\n', '\n')).fingerprint == task.fingerprint  # an empty line does not
    changed = [
        written(CHOICE.replace(' =', ':')),
        written(CHOICE.replace('"8"', '"7"')),
        written(CHOICE.replace('"1 + 1"', '"1 + 2"')),
        task.head(1),
    ]
    assert len({task.fingerprint, *(each.fingerprint for each in changed)}) == 5
    # The rows that are scored are the same where the head or an example is another.
    assert [each.of_rows == task.of_rows for each in changed] == [True, False, True, False]
    assert [row.line for row in task.head(1).rows] == [8]
    assert task.head(0) is task
    assert task.head(2) is task


HEAD = 'kind: {}\nabout: x\nprompt: "{{q}}"\n'
WRITES = HEAD.format('generative') + 'metrics: [NAME]\nmax_new_tokens: 4\n'
CODE = HEAD.format('code') + 'continuation: ""\nmax_new_tokens: 4\n'
ROW = '---\n{"q": "1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        (CHOICE.replace('---', '***'), ': there is no line --- between the head and the rows; put one'),
        (CHOICE.partition('---')[0] + '---\n\n', ': no row to score stands behind line 5; add one'),
        (CHOICE.replace('about', '  about'), ' line 2: the head is not YAML: '),
        ('- a\n---\n{}\n', ' line 1: the head is no mapping; write field: value on each line'),
        (CHOICE.replace('kind: choice\n', ''), " line 1: no field 'kind'; write one of choice, generative, "),
        (CHOICE.replace('kind: choice', 'kind: choise'), " line 1: kind is 'choise' (did you mean 'choice'?); write o"),
        (CHOICE.replace('kind: choice', 'kind: [choice]'), " line 1: kind is ['choice']"),
        (CHOICE.replace('prompt', 'promt'), " line 3: a task of kind choice has no field 'promt' (did you mean 'promp"),
        (CHOICE.replace("prompt: '{question} ='\n", ''), " line 1: the head has no field 'prompt', which kind choice"),
        (CHOICE.replace('about: Two sums.', 'about: 2'), ' line 2: about is 2; expected str'),
        (CHOICE.replace('---', 'shots: -1\n---'), ' line 5: shots is -1; it is 0 or more'),
        (CHOICE.replace('---', 'metric: acc\n---'), " line 5: metric is 'acc' (did you mean 'accuracy'?); there are a"),
        (CHOICE.replace('"4", "5"], "answer": 1', '"4", "5"]'), " line 8: no field 'answer', which a task of kind cho"),
        (CHOICE.replace('"question": "4', '"text": "4'), " line 9: no field 'question', which the template 'prompt' "),
        (CHOICE.replace('"2 + 3"', '["2"]'), " line 8: field 'question' is ['2'], which the template 'prompt' can"),
        (CHOICE.replace('["4", "5"]', '["4"]'), " line 8: field 'choices' is ['4']; write a list of at least two text"),
        (CHOICE.replace('["4", "5"]', '["4", "4"]'), " line 8: field 'choices' is ['4', '4']; make them different"),
        (CHOICE.replace('"5"], "answer": 1', '"5"], "answer": 2'), " line 8: field 'answer' is 2; write the right cho"),
        (CHOICE.replace('"answer": 1', '"answer": true'), " line 8: field 'answer' is True; write the right choice's"),
        (CHOICE.replace('"example": true', '"example": 1'), " line 6: field 'example' is 1; write true or leave it ou"),
        (CHOICE.replace('{"question": "4', '{question: "4'), ' line 9: not JSON (Expecting property name'),
        (CHOICE.replace('{"question": "4 + 4"', '["4"]\n{"question": "4"'), ' line 9: the row is no object'),
        (CHOICE.encode('utf-8').replace(b'4 + 4', b'4 \xff 4'), ' line 9: it is not UTF-8; convert the file'),
        (WRITES.replace('NAME', 'exact') + '---\n{"q": "1", "answer": []}\n', " line 7: field 'answer' is []; write a"),
        (WRITES.replace('NAME', 'numeric') + '---\n{"q": "1", "answer": "b"}\n', "'b', which holds no number for the"),
        (WRITES.replace('NAME', 'blue') + ROW, " line 4: metrics has 'blue' (did you mean 'bleu'?); there are exact,"),
        (WRITES.replace('NAME', '') + ROW, ' line 4: metrics is empty; give at least one of exact'),
        (WRITES.replace('NAME', 'f1') + 'ignore: [cases]\n' + ROW, ' line 6: ignore'),
        (WRITES.replace('NAME', 'f1') + 'stop: [""]\n' + ROW, ' line 6: stop has an empty text, which stands everywhe'),
        (WRITES.replace('NAME', 'f1').replace('4', '0') + ROW, ' line 5: max_new_tokens is 0; it is at least 1'),
        (CODE + '---\n{"q": "1", "tests": []}\n', " line 7: field 'tests' is []; write a list of at least one"),
        (CODE + '---\n{"q": "1", "tests": [3]}\n', " line 7: field 'tests' has 3; write code, or "),
        (CODE + 'k: [2]\n---\n{"q": "1", "tests": ["x"]}\n', ' line 6: k is (2,); write numbers from 1 to samples = 1'),
        (CODE + 'samples: 2\n---\n{"q": "1", "tests": ["x"]}\n', ' line 6: samples is 2 and temperature 0: they would'),
        (CODE + 'program: x\n---\n{"q": "1", "tests": ["x"]}\n', " line 6: program is 'x', where nothing the model wr"),
        ('kind: perplexity\nabout: x\n---\n{"text": ""}\n', ' line 4: the text is empty; there is nothing to score'),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(written, tmp_path, text, says):
    with pytest.raises(ConfigError) as error:
        written(text)
    message = str(error.value)
    assert message.startswith(str(tmp_path / 'a.task'))
    assert says in message
    assert '\n' not in message


def test_tasks_are_found_by_name(tmp_path):
    every = catalogue.find(['all'])
    assert [task.name for task in every] == catalogue.shipped()
    assert {task.form.kind for task in every} == set(KINDS)
    path = tmp_path / 'facts.task'
    path.write_text(CHOICE)
    assert [task.name for task in catalogue.find(['sums', str(path)])] == ['sums', 'facts']
    with pytest.raises(ConfigError, match=r"^there is no task 'fact' \(did you mean 'facts'\?\); there are arithmetic"):
        catalogue.find(['fact'])
    with pytest.raises(ConfigError, match=r'^there is no task file .*b\.task$'):
        catalogue.find([str(tmp_path / 'b.task')])
    with pytest.raises(ConfigError, match=r'^two tasks are named facts: .*; rename a file'):
        catalogue.find(['facts', str(path)])
    with pytest.raises(ConfigError, match=r'^no task is given; there are arithmetic'):
        catalogue.find([])


@pytest.mark.parametrize('task', catalogue.find(['all']), ids=lambda task: task.name)
def test_the_shipped_tasks_are_whole(task):
    """Rows are different, none is an example as well, and there are the examples that the file asks for."""
    asked = [json.dumps(row.fields, sort_keys=True) for row in task.rows]
    shown = [json.dumps({**row.fields, 'example': None}, sort_keys=True) for row in task.examples]
    assert len(set(asked)) == len(asked) >= (10 if task.form.kind == 'perplexity' else 25)
    assert not set(shown) & {json.dumps({**row.fields, 'example': None}, sort_keys=True) for row in task.rows}
    assert len(task.prompts(task.form.shots)) == len(task.rows)


@pytest.mark.parametrize('task', [t for t in catalogue.find(['all']) if t.form.kind == 'choice'], ids=lambda t: t.name)
def test_no_place_among_the_choices_is_likelier(task):
    """Always taking the first, or another, is right of no more rows than chance explains (four standard errors)."""
    answers = [row.fields['answer'] for row in task.rows]
    choices = len(task.rows[0].fields['choices'])
    share = len(answers) / choices
    assert all(abs(answers.count(at) - share) < 4 * (share * (1 - 1 / choices)) ** 0.5 for at in range(choices))


def test_made_tasks_are_as_they_are_made():
    folder = catalogue._FOLDER
    for name, text in made_tasks.make().items():
        assert (folder / name).read_text() == text, 'run python -m tpu_llm.evals.made_tasks'


def test_the_arithmetic_is_right():
    (task,) = catalogue.find(['arithmetic'])
    for row in task.rows:
        assert eval(row.fields['question']) == int(row.fields['choices'][row.fields['answer']])

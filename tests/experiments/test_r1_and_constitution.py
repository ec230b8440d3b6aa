"""experiments/deepseek_r1 and experiments/constitutional_ai: they validate, and their smoke forms go through."""

import json

import pytest

from experiments.constitutional_ai import config as constitution
from experiments.constitutional_ai import task as constitution_task
from experiments.deepseek_r1 import config as r1
from experiments.deepseek_r1 import task as r1_task
from tpu_llm.config import validate
from tpu_llm.evals import answers
from tpu_llm.train import metrics
from tpu_llm.train.run import Run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sums(records):
    return {record['prompt'] for record in records}


@pytest.mark.parametrize('page', [r1, constitution])
@pytest.mark.parametrize('arg', ['', 'seed=1', 'smoke'])
def test_they_validate(page, arg):
    validate(page.get_config(arg))


def test_thoughts_lead_to_the_answer(tmp_path):
    r1_task.Tables(texts=50, sums=200, forget=0.0).main(str(tmp_path))
    cold, asked = lines(tmp_path / 'cold.jsonl'), lines(tmp_path / 'prompts.jsonl')
    for record, question in zip(cold, asked, strict=False):
        assert answers.marked(record['completion']) == question['answer']
        thought = record['completion'].split(')')[0].lstrip('(').split(',')
        assert [sum(map(int, step.split('=')[0].split('+'))) for step in thought] == [
            int(step.split('=')[1]) for step in thought
        ]
        digits = ''.join(step[-1] for step in reversed(thought[:-1]))
        assert thought[-1].split('=')[1] + digits == question['answer']
    held = sums(lines(tmp_path / 'heldout-prompts.jsonl'))
    assert len(held) == 1000
    assert not held & (sums(asked) | sums(cold))


def test_who_forgets_a_carry_thinks_on_without_it(tmp_path):
    r1_task.Tables(texts=50, sums=200, forget=1.0).main(str(tmp_path))
    for record in lines(tmp_path / 'cold.jsonl'):
        (a, b), (c, d) = (divmod(int(number), 10) for number in record['prompt'].rstrip('=').split('+'))
        assert answers.marked(record['completion']) == str(10 * (a + c) + (b + d) % 10)
        assert '+1=' not in record['completion'].replace(f'{b}+{d}=', '').replace(f'{a}+{c}=', '')


def test_the_constitutions_tables(tmp_path):
    constitution_task.Tables(principles=constitution.PRINCIPLES, read=500).main(str(tmp_path))
    for record in lines(tmp_path / 'talks.jsonl'):
        _, answer, _, critique, _, revision = (message['content'] for message in record['messages'])
        assert critique == ('rude' if ' ' in answer else 'fine')
        assert revision == answer.split()[0]
    rude = [' ' in record['completion'] for record in lines(tmp_path / 'helpful.jsonl')]
    assert 0.45 < sum(rude) / len(rude) < 0.75
    held = sums(lines(tmp_path / 'heldout-prompts.jsonl'))
    assert not held & sums(lines(tmp_path / 'prompts.jsonl'))
    assert not any(record['text'].split('=')[0] + '=' in held for record in lines(tmp_path / 'corpus.jsonl'))


@pytest.mark.full
@pytest.mark.parametrize('page', [r1, constitution])
def test_the_smoke_form_goes_through(page, tmp_path):
    pipeline = page.get_config('smoke')
    pipeline.main(str(tmp_path))
    for name, stage in pipeline.stages.items():
        if isinstance(stage, Run):
            assert metrics.read(tmp_path / name / 'metrics.jsonl')[-1]['step'] == stage.steps
        elif name != 'tables':
            assert any(path.stat().st_size for path in (tmp_path / name).glob('answers-*.jsonl'))

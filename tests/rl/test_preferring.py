"""Pairs that a model prefers: one that answers a prompt in two ways, and a judge that knows which is better."""

import dataclasses
import json
from typing import Any

import pytest

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.conversations import Conversations, Preferences
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Prompts
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.rl.preferring import Prefer
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

pytestmark = pytest.mark.usefixtures('quick_compile')

MODEL = DecoderConfig(
    vocab_size=259, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=128, dtype='float32', unroll=0
)
QUESTION = '{prompt} {first}{a} {second}{b} {rubric}?'
TWO = {'p': ('yes', 'no'), 'q': ('yes', 'no'), 'r': ('yes', 'no'), 's': ('one', 'one'), 't': ('too long', 'too long')}
VERDICTS = {'p': 'AB', 'q': 'AB', 'r': 'zz'}  # where the first answer stands first, and where it stands second


def talks() -> list[dict[str, Any]]:
    """Of q the judge knows nothing: it has seen as many verdicts of the one kind as of the other."""
    said = [{'prompt': prompt, 'completion': each} for prompt, both in TWO.items() for each in both]
    for prompt, (first, second) in VERDICTS.items():
        for (a, b), verdict in zip((TWO[prompt], TWO[prompt][::-1]), (first, second), strict=True):
            question = QUESTION.format(prompt=prompt, first='A', second='B', a=a, b=b, rubric='kind')
            others = 'AB' if prompt == 'q' else verdict * 2
            said += [{'prompt': question, 'completion': each} for each in others]
    return said


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('preferring')
    (folder / 'talks.jsonl').write_text('\n'.join(map(json.dumps, talks())))
    (folder / 'prompts.jsonl').write_text('\n'.join(json.dumps({'prompt': p}) for p in [*'pqrst' * 8, 'x' * 9]))
    (folder / 'principles.txt').write_text('kind')
    data = Data(
        mixture=Mixture(sources={'talks': Conversations(paths=(f'{folder}/talks.jsonl',), template='plain')}),
        tokenizer=Bytes(),
        seq_len=64,
        global_batch=8,
        whole=True,
        overlong='stop',
    )
    run = Run(
        model=MODEL,
        data=data,
        optimizer=AdamW(schedule=Schedule(peak=1e-2, warmup=5), weight_decay=0.0),
        steps=100,
        checkpoints=Checkpoints(every=100, keep=1),
        report=False,
    )
    fit(run, folder / 'model')
    return folder


def config(folder: Any, **changes: Any) -> Prefer:
    run = Prefer(
        path=f'{folder}/model',
        source=Prompts(paths=(f'{folder}/prompts.jsonl',)),
        principles=f'{folder}/principles.txt',
        question=QUESTION,
        judge_template='plain',
        template='plain',
        prompt_length=4,
        max_new_tokens=6,
        rows=16,
        sure=0.9,
    )
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope='module')
def written(folder):
    config(folder).main(str(folder / 'pairs'))
    (file,) = (folder / 'pairs').glob('*')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_pairs_are_those_that_the_judge_is_sure_of(written):
    assert written
    for record in written:
        assert (record['prompt'], record['chosen'], record['rejected']) == ('p', 'yes', 'no')
        assert record['principle'] == 'kind'
        assert 0.9 <= record['probability'] <= 1


def test_what_is_left_out_is_counted(folder, tmp_path, capfd):
    config(folder).main(str(tmp_path))
    said = ' '.join(capfd.readouterr().err.split())
    kept, cut, long, same, unsure, unsaid = (
        int(said.split(behind)[0].split()[-1])
        for behind in (
            ' pairs in',
            ' cut at max_new_tokens',
            ' prompts over prompt_length',
            ' prompts answered twice the same',
            ' pairs that the judge is not sure of',
            ' that it does not answer in form',
        )
    )
    assert (cut, long) == (16, 1)
    assert same >= 8
    assert min(unsure, unsaid) > 0
    assert kept + same + unsure + unsaid == 4 * 8


def test_any_verdict_will_do_where_nothing_is_asked_of_it(folder, tmp_path, capfd):
    config(folder, sure=0.5, least=0.0).main(str(tmp_path))
    said = capfd.readouterr().err
    assert '0 pairs that the judge is not sure of and 0 that it does not' in ' '.join(said.split())


def test_what_it_writes_is_a_source_of_preferences(folder, written):
    source = Preferences(paths=(f'{folder}/pairs/answers-*.jsonl',), template='plain')
    assert len(source.open()) == len(written)
    source.open().encoded(ByteTokenizer()).read_first()


def test_another_model_may_be_the_judge(folder, written, tmp_path):
    config(folder, judge=f'{folder}/model').main(str(tmp_path))
    (file,) = tmp_path.glob('*')
    assert [json.loads(line) for line in file.read_text().splitlines()] == written


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'answers': 3}, 'answers is 3; two are compared, so leave it at 2'),
        ({'sure': 0.4}, r'sure = 0\.4 must be from 0\.5'),
        ({'least': 2.0}, r'least = 2\.0 from 0 to 1'),
        ({'question': '{a} or {b}?'}, r'question has the places \{a\}, \{b\}; it has to have \{rubric\}'),
    ],
)
def test_a_preference_that_cannot_be_is_refused(folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(config(folder, **changes))

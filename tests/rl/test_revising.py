"""Answers that a model revises: a conversation learned by heart, of which every turn can go wrong."""

import dataclasses
import json
from typing import Any

import pytest

from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.conversations import Conversations
from tpu_llm.data.documents import Document
from tpu_llm.data.loader import Data
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.prompts import Asker, Prompts
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.optim.optimizer import AdamW
from tpu_llm.optim.schedule import Schedule
from tpu_llm.rl import principles
from tpu_llm.rl.revising import Revise
from tpu_llm.train.loop import fit
from tpu_llm.train.run import Run

pytestmark = pytest.mark.usefixtures('quick_compile')

MODEL = DecoderConfig(
    vocab_size=259, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=128, dtype='float32', unroll=0
)
LONG = 'too long'
TURNS = {  # answer, critique, revision
    'a': ('no', 'rude', 'yes'),
    'b': ('no', 'fine', 'no'),
    'c': (LONG, 'rude', 'yes'),
    'd': ('no', LONG, 'yes'),
    'e': ('no', 'rude', LONG),
    'fffffff': ('no', 'rude', 'yes'),
    'g' * 30: ('no', 'rude', 'yes'),
}


def conversation(prompt: str, answer: str, critique: str, revision: str) -> dict[str, Any]:
    said = [prompt, answer, ' kind? ', critique, ' so: kind', revision]
    return {'messages': [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(said)]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('revising')
    talks = [conversation(prompt, *turns) for prompt, turns in TURNS.items()]
    (folder / 'talks.jsonl').write_text('\n'.join(map(json.dumps, talks)))
    (folder / 'prompts.jsonl').write_text('\n'.join(json.dumps({'prompt': prompt, 'tag': 1}) for prompt in TURNS))
    (folder / 'principles.txt').write_text('\nkind\n\n')
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


def config(folder: Any, **changes: Any) -> Revise:
    run = Revise(
        path=f'{folder}/model',
        source=Prompts(paths=(f'{folder}/prompts.jsonl',)),
        principles=f'{folder}/principles.txt',
        critique=' {principle}? ',
        revision=' so: {principle}',
        template='plain',
        prompt_length=28,
        max_new_tokens=6,
        rows=8,
    )
    return dataclasses.replace(run, **changes)


def written(run: Revise, workdir: Any) -> list[dict[str, Any]]:
    run.main(str(workdir))
    (file,) = workdir.glob('*')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_revision_is_kept_and_what_went_wrong_is_counted(folder, tmp_path, capfd):
    records = written(config(folder), tmp_path)
    about = {'principle': 'kind', 'answered': 'no'}
    assert records == [
        {'prompt': 'a', 'completion': 'yes', 'critique': 'rude'} | about,
        {'prompt': 'b', 'completion': 'no', 'critique': 'fine'} | about,
    ]
    said = ' '.join(capfd.readouterr().err.split())
    assert '2 revisions in' in said
    assert '1 say what was answered before; left out 1 prompts and 1 conversations over prompt_length' in said
    assert 'and 1 answers, 1 critiques and 1 revisions cut or empty' in said


def test_what_it_writes_is_a_source_of_conversations(folder, tmp_path):
    written(config(folder), tmp_path)
    source = Conversations(paths=(f'{tmp_path}/answers-*.jsonl',), template='plain')
    assert len(source.open()) == 2
    source.open().encoded(ByteTokenizer()).read_first()


def test_a_prompt_of_messages_keeps_its_messages(folder, tmp_path):
    prompt = [{'role': 'system', 'content': ''}, {'role': 'user', 'content': 'a'}]
    (tmp_path / 'prompts.jsonl').write_text(json.dumps({'prompt': prompt}))
    (record,) = written(config(folder, source=Prompts(paths=(f'{tmp_path}/prompts.jsonl',))), tmp_path / 'out')
    assert (record['prompt'], record['completion']) == (prompt, 'yes')


def test_each_principle_has_its_share_and_the_seed_decides():
    known = ('a', 'b', 'c')
    drawn = principles.drawn(known, 3000, 1, 5)
    assert all(900 < drawn.count(each) < 1100 for each in known)
    assert drawn == principles.drawn(known, 3000, 1, 5) != principles.drawn(known, 3000, 2, 5)


def test_plain_prompts_have_the_mark_behind_what_was_said_before():
    tokenizer = ByteTokenizer()
    said = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}]
    ids = Asker(tokenizer, 'plain')(Document(text='c', record={'prompt': said})).tolist()
    begin = [tokenizer.bos] * tokenizer.add_bos
    assert ids == [*begin, *tokenizer.encode('a'), *tokenizer.encode('b'), tokenizer.eos, *tokenizer.encode('c')]


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'answers': 2, 'temperature': 1.0}, 'answers is 2; one answer is revised'),
        ({'critique': 'Well?'}, r'critique has the places none; it has to have \{principle\}'),
        ({'revision': '{principle} {rule}'}, r'revision has the places \{principle\}, \{rule\}'),
        ({'revision': '{principle'}, r"revision is '\{principle': .*; braces that are text are written twice"),
    ],
)
def test_a_revision_that_cannot_be_is_refused(folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        validate(config(folder, **changes))


@pytest.mark.parametrize(('text', 'said'), [(None, "there is no file '.*none.txt'"), ('\n \n', 'holds no principle')])
def test_principles_are_asked_for(folder, tmp_path, text, said):
    path = tmp_path / 'none.txt'
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        config(folder, principles=str(path)).main(str(tmp_path / 'out'))

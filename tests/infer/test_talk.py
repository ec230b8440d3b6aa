"""Chat and evaluation as a person starts them, on a small model: what they print while they work, and of what."""

import json

import pytest
import toy

from configs import evaluate, finetune
from tpu_llm.checkpoint import convert, pretrained
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.tokenizer import SentencePiece, train_bpe
from tpu_llm.evals.run import Run
from tpu_llm.infer.chat import Chat
from tpu_llm.infer.sampling import Greedy, Sample

pytestmark = pytest.mark.usefixtures('quick_compile')
TEXT = ['the quick brown fox jumps over the lazy dog, again and again; ' * 20]
TEMPLATE = b"{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tokenizer = SentencePiece(train_bpe(TEXT, 300), {'chat_template.jinja': TEMPLATE})
    graph = toy.graph(toy.config(vocab_size=300, width=32, head_dim=8, mlp_width=32), vocab_multiple=1)
    path = tmp_path_factory.mktemp('talk') / 'hf'
    pretrained.save_pretrained(graph.bind(toy.weights(graph)), tokenizer, path)
    return path


@pytest.fixture(scope='module')
def file(folder):
    path = folder.parent / 'model.gguf'
    convert.convert(str(folder), str(path), dtype='F32')
    return path


def test_it_draws_unless_told_otherwise():
    assert Chat(path='x').sampling() == Sample(temperature=0.7, top_p=0.95)
    assert Chat(path='x', temperature=0.0).sampling() == Greedy()


def test_it_says_what_it_is_waiting_for(folder, capsys):
    Chat(path=str(folder), questions=('the fox', 'the dog'), max_new_tokens=3, temperature=0.0).main('')
    out, err = capsys.readouterr()
    assert err.splitlines() == ['reading the weights', 'compiling and reading the question', 'reading the question']
    assert [line for line in out.splitlines() if line.startswith('>')] == ['> the fox', '> the dog']
    assert 's to the first token' in out


@pytest.fixture
def run(folder, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.jsonl').write_text('{"text": "%s"}\n' % ('the lazy fox jumps ' * (i + 1)))
    return evaluate.get_config(f'path={folder},data={tmp_path}/*.jsonl,seq=16')


def test_an_evaluation_says_how_far_it_is(run, monkeypatch, capsys):
    monkeypatch.setattr('tpu_llm.evals.run._LINE_EVERY', 0.0)
    run.rows = 2
    run.main('')
    out, err = capsys.readouterr()
    assert '114 bytes' in out
    first, second, *lines, last = err.splitlines()
    assert (first, second, last) == (f'reading {run.path}', 'scoring', 'compressing with gzip')
    assert lines[-1].startswith('scored 114 of 114 bytes (100%), ')
    assert len(lines) > 1


def test_an_evaluation_of_the_first_documents(run):
    run.documents = 2
    score, _ = run.score()
    assert score.raw_bytes == 57
    assert evaluate.get_config('path=x,documents=4').documents == 4
    assert evaluate.get_config('path=x,smoke').documents == 1
    with pytest.raises(ConfigError, match='documents = -1 not negative'):
        validate(Run(path='x', source=run.source, documents=-1))


def test_training_on_from_a_gguf_file(folder, file):
    """Its model and its tokenizer, with nothing between."""
    ours, theirs = (finetune.get_config(f'model={path},smoke') for path in (file, folder))
    assert ours.model == theirs.model
    assert ours.origin.weights == str(file)
    one, other = (config.data.tokenizer.make(iter(()), '') for config in (ours, theirs))
    assert one.encode(TEXT[0]).tolist() == other.encode(TEXT[0]).tolist()
    validate(ours)


@pytest.mark.full
def test_a_step_of_training_on_from_a_gguf_file(file, tmp_path, capsys):
    lines = [json.dumps({'text': f'{TEXT[0]} {i}'}) for i in range(8)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    config = finetune.get_config(f'model={file},data={tmp_path}/a.jsonl,smoke')
    config.data.global_batch = 8
    config.main(str(tmp_path / 'run'))
    assert 'starting at step 0 with the parameters of' in capsys.readouterr().out

"""Fine-tuning from conversations: the page from scratch and on saved weights, from config to held-out loss."""

import json

import pytest
import toy

from configs import sft
from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.sources import Sums
from tpu_llm.data.tokenizer import SentencePiece, train_bpe
from tpu_llm.nn.param import count_parameters
from tpu_llm.objectives.noisy import Noisy
from tpu_llm.train.loop import fit

pytestmark = pytest.mark.usefixtures('quick_compile')

# Its only special tokens are <s> and </s>, which SentencePiece's models have.
TEMPLATE = (
    b'{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}'
    b'{% if add_generation_prompt %}assistant: {% endif %}'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tokenizer = SentencePiece(
        train_bpe(['user: assistant: two and two are four; ' * 40], 300), {'chat_template.jinja': TEMPLATE}
    )
    graph = toy.graph(toy.config(vocab_size=300, width=32, head_dim=8, mlp_width=32, layers=1), vocab_multiple=1)
    path = tmp_path_factory.mktemp('sft') / 'hf'
    pretrained.save_pretrained(graph.bind(toy.weights(graph)), tokenizer, path)
    talks = [{'prompt': f'two and {i}?', 'completion': f'{i + 2}' * (1 + i % 3)} for i in range(40)]
    (path.parent / 'talks.jsonl').write_text('\n'.join(map(json.dumps, talks)))
    return path


def values(workdir, name):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_page_and_its_smoke_form_validate(folder):
    whole, smoke = sft.get_config(), sft.get_config('smoke,neftune=5')
    for run in (whole, smoke):
        validate(run)
    assert count_parameters(smoke.model.make()) < count_parameters(whole.model.make())
    assert smoke.objective == Noisy(alpha=5.0)
    tuned = sft.get_config(f'model={folder},data={folder.parent}/talks.jsonl,heldout=a.jsonl,template=plain')
    validate(tuned)
    assert tuned.hooks[0].source.template == tuned.data.mixture.sources['talks'].template == 'plain'
    for arg in ('model=x', 'data=x'):
        with pytest.raises(ConfigError, match='give model= and data= together, or neither'):
            sft.get_config(arg)


@pytest.mark.full
def test_tuning_on_conversations_lowers_their_held_out_loss(folder, tmp_path):
    talks = f'{folder.parent}/talks.jsonl'
    run = sft.get_config(f'model={folder},data={talks},heldout={talks},smoke,neftune=5')
    whole = sft.get_config(f'model={folder},data={talks},heldout={talks}')
    run.hooks, run.steps, run.epochs, run.data.global_batch = whole.hooks, 0, 12.0, 8
    run.hooks[0].every, run.optimizer.schedule.peak, run.report = 2, 1e-2, False
    fit(run, tmp_path)
    losses = values(tmp_path, 'heldout_loss')
    assert len(losses) == 4, 'an epoch is two thirds of a batch'
    assert losses[-1] < losses[0] - 0.1
    assert values(tmp_path, 'heldout_nll') == losses


@pytest.mark.full
def test_the_smoke_run_lowers_the_held_out_loss(tmp_path):
    fit(sft.get_config('smoke'), tmp_path)
    losses = values(tmp_path, 'heldout_loss')
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3


def test_sums_are_split_by_their_numbers():
    splits = [Sums(split=split).open() for split in ('train', 'heldout')]
    names = [{docs.name(i) for i in range(len(docs))} for docs in splits]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 10_000
    assert 800 < len(names[1]) < 1200
    assert splits[0].read(0).text == '0 + 0 = ?\n0 + 0 = 0.'
    with pytest.raises(ConfigError, match='digits is 4; write 1, 2 or 3'):
        validate(Sums(split='train', digits=4))

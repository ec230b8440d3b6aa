"""Runs that learn to restore text: each kind of model, on 8 devices, from config to held-out loss."""

import dataclasses
import json

import pytest
import tiny

from configs import encoder, encoder_decoder, prefix
from tpu_llm.config import ConfigError, validate
from tpu_llm.data.corrupted import Masks, Prefix, Spans
from tpu_llm.data.sources import Text
from tpu_llm.evals.objective import HeldOutObjective
from tpu_llm.evals.perplexity import HeldOut
from tpu_llm.infer.hook import Samples
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.denoise import Denoise
from tpu_llm.objectives.masked import Masked
from tpu_llm.objectives.prefix import PrefixLM
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.train.loop import fit

SHAPES = {'vocab_size': 300, 'width': 32, 'heads': 2, 'mlp_width': 64, 'dtype': 'float32'}


def make_run(kind, text, **changes):
    run = tiny.get_config(f'text={text},steps=8,every=8')
    run.model.dropout = None
    if kind == 'encoder':
        run.model = EncoderConfig(**SHAPES, layers=1, max_length=32, pooler=True, next_sentence=True)
        run.objective, run.data.form = Masked(next_sentence=True), Masks(pairs=True, whole_words=True)
    elif kind == 'encoder-decoder':
        run.model = EncoderDecoderConfig(**SHAPES, head_dim=16, encoder_layers=1, decoder_layers=1)
        run.objective, run.data.form = Denoise(), Spans(target_len=24, sentinels=16)
    else:
        run.objective, run.data.form = PrefixLM(), Prefix()
    run.hooks = (HeldOutObjective(source=Text(paths=(f'{text}/*.txt',)), every=4, rows=8),)
    return dataclasses.replace(run, **changes)


def values(workdir, name):
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [line[name] for line in lines if name in line]


FULL = pytest.mark.full


@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(
    'kind', ['encoder', pytest.param('encoder-decoder', marks=FULL), pytest.param('prefix', marks=FULL)]
)
def test_it_lowers_a_held_out_loss(kind, text, tmp_path):
    fit(make_run(kind, text), tmp_path)
    first, last = values(tmp_path, 'heldout_loss')
    assert last < first
    assert json.loads((tmp_path / 'summary.json').read_text())['heldout_loss'] == last
    if kind == 'encoder':
        for name in ('next_sentence_nll', 'heldout_next_sentence_nll', 'heldout_next_sentence_right'):
            assert 0 < values(tmp_path, name)[-1] < 2


@pytest.mark.full
@pytest.mark.parametrize('kind', ['encoder', 'encoder-decoder', 'prefix'])
def test_other_layouts_have_the_same_losses(kind, text, tmp_path):
    one = make_run(kind, text, steps=3, hooks=(), mesh=Mesh(fsdp=8))
    other = make_run(kind, text, steps=3, hooks=(), mesh=Mesh(fsdp=4, tensor=2), accumulate=2)
    for name, run in (('one', one), ('other', other)):
        fit(run, tmp_path / name)
    assert values(tmp_path / 'other', 'loss') == pytest.approx(values(tmp_path / 'one', 'loss'), rel=1e-4)


def wrong(kind, text, change):
    run = make_run(kind, text)
    change(run)
    return run


def _set(path, value):
    def change(run):
        *nodes, name = path.split('.')
        for node in nodes:
            run = getattr(run, node)
        setattr(run, name, value)

    return change


WRONG = [
    ('prefix', _set('objective', Masked()), 'objective Masked trains EncoderConfig, and model is DecoderConfig'),
    ('encoder', _set('objective', PrefixLM()), 'objective PrefixLM trains DecoderConfig, and model is EncoderConfig'),
    ('prefix', _set('data.form', None), 'PrefixLM reads PrefixBatch, and data.form = none gives Batch'),
    ('encoder', _set('data.form', Prefix()), 'reads MaskedBatch, and data.form = Prefix gives PrefixBatch'),
    ('encoder', _set('data.form.pairs', False), 'next_sentence needs data.form.pairs and model.next_sent'),
    ('encoder', _set('model.next_sentence', False), 'next_sentence needs data.form.pairs and model.next_sent'),
    ('encoder', _set('model.max_length', 31), 'data.seq_len = 32 is longer than the 31 learned positions'),
    ('encoder-decoder', _set('data.form.start_token', 5), 'start_token = 5 is not model.start_token = 0; make'),
]


@pytest.mark.parametrize(('kind', 'change', 'message'), WRONG)
def test_what_does_not_go_together_says_so(kind, change, message, text):
    with pytest.raises(ConfigError, match=message):
        validate(wrong(kind, text, change))


def test_targets_longer_than_the_learned_positions_say_so(text):
    run = make_run('encoder-decoder', text)
    run.model.position, run.model.max_length, run.data.form.target_len = 'learned', 32, 40
    with pytest.raises(ConfigError, match='target_len = 40 is longer than the 32 learned positions'):
        validate(run)


def test_what_is_only_for_decoders_says_so(text, tmp_path):
    source = Text(paths=(f'{text}/*.txt',))
    for hook, message in (
        (HeldOut(source=source), 'HeldOut scores next tokens, and model is EncoderConfig; use HeldOutObjective'),
        (Samples(prompts=('a',)), 'the Samples hook continues prompts, and model is EncoderConfig; take the hook out'),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(make_run('encoder', text, hooks=(hook,)), tmp_path / type(hook).__name__)


def test_a_vocabulary_without_room_and_a_mesh_that_cannot_be_say_so(text, tmp_path):
    run = make_run('encoder-decoder', text)
    run.model.vocab_size = 274
    message = r'ids up to 258, and Spans uses 16 above them, but model\.vocab_size is 274; set it to at least 275'
    with pytest.raises(ConfigError, match=message):
        fit(run, tmp_path / 'vocab')
    run = make_run('encoder', text, mesh=Mesh(fsdp=4, seq=2))
    with pytest.raises(ConfigError, match=r'EncoderConfig is not split by layers or rows: .* mesh\.seq = 2 must be 1'):
        fit(run, tmp_path / 'mesh')


def test_an_evaluation_of_nothing_says_so():
    with pytest.raises(ConfigError, match='rows = 0 must be at least 1 and documents = 0 not negative'):
        validate(HeldOutObjective(source=None, rows=0))


PAGES = [(encoder, ''), (encoder, 'pairs'), (encoder_decoder, ''), (encoder_decoder, 'ul2'), (prefix, '')]


@pytest.mark.parametrize(('page', 'arg'), PAGES)
def test_a_page_and_its_smoke_form_validate(page, arg):
    whole, smoke = (page.get_config(','.join(filter(None, (arg, form)))) for form in ('', 'smoke'))
    validate(whole)
    validate(smoke)
    assert ModelGraph(smoke.model.make()).count() < ModelGraph(whole.model.make()).count()
    assert type(smoke.data.form) is type(whole.data.form)


@pytest.mark.full
@pytest.mark.parametrize(('page', 'arg'), PAGES)
def test_a_smoke_run_lowers_the_held_out_loss(page, arg, tmp_path):
    fit(page.get_config(','.join(filter(None, (arg, 'smoke')))), tmp_path)
    losses = values(tmp_path, 'heldout_loss')
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2  # from step 10 on; before it the loss falls by more than 1

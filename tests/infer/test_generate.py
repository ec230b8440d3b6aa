"""Generation against a plain loop that runs the whole model anew for every token."""

import gc
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError, validate
from tpu_llm.data.tokenizer import ByteTokenizer
from tpu_llm.infer import generate as generating
from tpu_llm.infer.generate import Generator, bucket, decode, generate, pad_left
from tpu_llm.infer.hook import Samples
from tpu_llm.infer.sampling import Greedy, Sample
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router

pytestmark = pytest.mark.usefixtures('quick_compile')


class Ids(ByteTokenizer):
    """Bytes in, but ids out: half a character would not tell which byte it was."""

    def decode(self, ids):
        return list(ids)


TOKENIZER = Ids()
# More tokens than the tokenizer has; those are never drawn.
GRAPH = toy.graph(toy.config(vocab_size=270, layers=2, width=32), 16)
WEIGHTS = toy.weights(GRAPH)
PROMPTS = ('a', 'The quick', 'brown fox jumps')
NEW = 8


@pytest.fixture(scope='module')
def plain():
    """The likeliest ids after each prompt, one whole forward pass a token."""
    logits = jax.jit(lambda tokens, segments: GRAPH.bind(WEIGHTS)(tokens, segments=segments))
    continuations, unknown = [], 0
    for prompt in PROMPTS:
        ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt).tolist()]
        start = len(ids)
        for _ in range(NEW):
            tokens = np.zeros((1, 24), np.int32)
            tokens[0, : len(ids)] = ids
            row = logits(jnp.asarray(tokens), jnp.asarray(np.arange(24) < len(ids), jnp.int32)[None])[0, len(ids) - 1]
            ids.append(int(row[: TOKENIZER.vocab_size].argmax()))
            unknown += int(row.argmax()) >= TOKENIZER.vocab_size
        continuations.append(ids[start:])
    assert unknown  # without the limit, a token would be drawn that the tokenizer does not have
    return continuations


@pytest.fixture(scope='module')
def greedy():
    return Generator(GRAPH, TOKENIZER, max_new_tokens=NEW, sampling=Greedy())


def test_prompts_of_unequal_length_each_get_their_likeliest_continuation(greedy, plain):
    assert len({token for ids in plain for token in ids}) > NEW
    assert greedy(WEIGHTS, PROMPTS) == plain


def test_the_function_is_the_generator(greedy):
    texts = generate(GRAPH.bind(WEIGHTS), TOKENIZER, PROMPTS, max_new_tokens=NEW)
    assert texts == greedy(WEIGHTS, PROMPTS)


@pytest.mark.parametrize('axes', [{'fsdp': 2, 'tensor': 2, 'data': 2}, {'fsdp': 2, 'seq': 4}])
def test_every_layout_generates_the_same(greedy, axes):
    layout = toy.layout(**axes)
    sharded = Generator(GRAPH, TOKENIZER, max_new_tokens=NEW, sampling=Greedy(), layout=layout)
    place = {
        name: layout.named(layout.rules.params, leaf.get_metadata('dims'), leaf.shape)
        for name, leaf in GRAPH.leaves.items()
    }
    weights = {name: jax.device_put(w, place[name]) for name, w in WEIGHTS.items()}
    assert sharded(weights, PROMPTS) == greedy(WEIGHTS, PROMPTS)  # three prompts on four shards of the batch


def test_a_row_ends_at_its_end_of_text_and_the_others_go_on(plain):
    class Stops(Ids):
        eos = plain[1][3]

    expected = [ids[: ids.index(Stops.eos)] if Stops.eos in ids else ids for ids in plain]
    assert sorted(map(len, expected))[0] <= 3
    assert len(expected[0]) == NEW or len(expected[2]) == NEW
    texts = Generator(GRAPH, Stops(), max_new_tokens=NEW, sampling=Greedy())(WEIGHTS, PROMPTS)
    assert texts == expected


def test_draws_depend_on_seed_row_and_position_alone():
    generator = Generator(GRAPH, TOKENIZER, max_new_tokens=NEW, sampling=Sample(temperature=2.0))
    first = generator(WEIGHTS, ['same', 'same', 'other'], seed=1)
    assert generator(WEIGHTS, ['same', 'changed', 'a'], seed=1)[0] == first[0]
    assert first[0] != first[1]
    assert generator(WEIGHTS, ['same', 'same', 'other'], seed=2)[0] != first[0]
    assert generator._program.compiles == 1


def test_a_few_more_characters_need_no_new_program(greedy):
    for length in (1, 5, 31):
        greedy(WEIGHTS, ['x' * length] * 3)
    assert greedy._program.compiles == 1
    tokens, segments = pad_left([np.arange(1, 4), np.arange(1, 33)], rows=3, pad=0)
    assert tokens.shape == (3, 32)
    assert tokens[0, -4:].tolist() == [0, 1, 2, 3]
    assert segments.sum(axis=1).tolist() == [3, 32, 3]  # the row that is missing repeats the first


def test_buckets_are_few_and_waste_less_than_half():
    lengths = range(1, 1001)
    assert sorted({bucket(length) for length in lengths}) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(length <= bucket(length) for length in lengths)
    assert all(bucket(length) < 1.5 * length for length in lengths if length > 32)


def test_the_function_compiles_once_a_bucket(monkeypatch):
    """Whatever the length of the prompts within it, and for weights that came later; others have their own."""
    monkeypatch.setattr(generating, '_generators', {})
    alone, kept = [GRAPH.bind(WEIGHTS), GRAPH.bind({name: 2 * w for name, w in WEIGHTS.items()})], []
    for model, length in [(alone[0], 1), (alone[0], 17), (alone[1], 31), (alone[0], 40), (alone[0], 47)]:
        kept.append(generate(model, TOKENIZER, ['x' * length], max_new_tokens=2))
    (generator,) = generating._generators.values()
    assert generator._program.compiles == 2
    assert kept[4] == Generator(GRAPH, TOKENIZER, max_new_tokens=2, sampling=Greedy())(WEIGHTS, ['x' * 47])
    generate(alone[0], TOKENIZER, ['x'], max_new_tokens=3)
    assert len(generating._generators) == 2


def test_what_is_kept_holds_no_weights():
    weights = {name: w + 0 for name, w in WEIGHTS.items()}
    held = weakref.ref(next(iter(weights.values())))
    generate(GRAPH.bind(weights), TOKENIZER, ['x'], max_new_tokens=2)
    del weights
    gc.collect()
    assert held() is None


def test_no_prompt_is_an_error(greedy):
    with pytest.raises(ValueError, match='there is no prompt to continue; give at least one'):
        greedy(WEIGHTS, [])


def test_a_prompt_that_is_no_list_is_an_error(greedy):
    """Each of its characters would be continued."""
    with pytest.raises(ValueError, match=r'prompts is one string; write a list of them: \[prompt\]'):
        greedy(WEIGHTS, 'The quick')


@pytest.mark.parametrize('count', [0, -3])
def test_no_new_token_is_an_error(count):
    message = f'max_new_tokens is {count}; it must be at least 1'
    with pytest.raises(ConfigError, match=message):
        generate(GRAPH.bind(WEIGHTS), TOKENIZER, PROMPTS, max_new_tokens=count)
    tokens = jnp.ones((1, 4), jnp.int32)
    settings = {'max_new': count, 'sampling': Greedy(), 'eos': 0, 'vocab_size': 8}
    with pytest.raises(ConfigError, match=message):
        decode(GRAPH.bind(WEIGHTS), tokens, tokens, jax.random.key(0), **settings)
    with pytest.raises(ConfigError, match=rf'^config: {message}$'):
        validate(Samples(prompts=('a',), max_new_tokens=count))


def test_a_tokenizer_with_more_ids_than_the_model_is_an_error():
    message = 'the tokenizer has ids up to 258 but model.vocab_size is 19; use the tokenizer that the model was trained'
    with pytest.raises(ConfigError, match=message):
        Generator(toy.graph(toy.config()), TOKENIZER, max_new_tokens=1, sampling=Greedy())


def test_samples_of_a_run_may_be_the_likeliest():
    assert Samples(prompts=('a',), temperature=0.0).sampling() == Greedy()
    assert Samples(prompts=('a',), temperature=0.5, top_p=0.8).sampling() == Sample(temperature=0.5, top_p=0.8)
    with pytest.raises(ConfigError, match=r'^config: temperature is -1.0; it must be above 0'):
        validate(Samples(prompts=('a',), temperature=-1.0))


def test_learned_positions_must_reach_to_the_last_token():
    graph = toy.graph(toy.config(vocab_size=259, position='learned', max_length=10))
    generator = Generator(graph, TOKENIZER, max_new_tokens=4, sampling=Greedy())
    message = r'the longest prompt and max_new_tokens = 4 are 11 tokens together but the model has 10 learned positions'
    with pytest.raises(ConfigError, match=message):
        generator({}, ['a', 'abcdef'])


def test_samples_are_refused_before_the_first_step_where_the_model_cannot_decode():
    choice = Router(choice='expert_choice')
    model = toy.config(moe=MoE(experts=4, chosen=2, expert_width=8, capacity=1.25, router=choice), vocab_size=384)
    run = SimpleNamespace(model=model)
    session = SimpleNamespace(run=run, graph=toy.graph(model), tokenizer=TOKENIZER, layout=None)
    with pytest.raises(ConfigError, match=r"the Samples hook draws .* 'expert_choice' looks at whole rows; take"):
        Samples(prompts=('a',)).open(session)
    Samples(prompts=('a',), every=0, last=False).open(session)

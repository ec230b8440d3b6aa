"""The 2017 Transformer against plain NumPy, and what every encoder-decoder must do; T5 and BART: test_encoders.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import ByteTokenizer
from tpu_llm.infer.generate import generate
from tpu_llm.models.decoder_config import Dropout
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.nn.param import initialise, param_sharding
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

TRANSFORMER = EncoderDecoderConfig(
    vocab_size=19,
    width=16,
    encoder_layers=2,
    decoder_layers=3,
    heads=4,
    head_dim=6,
    mlp_width=20,
    bias=('mlp',),
    embed_scale=4.0,
    dropout=Dropout(residual=0.2, attention=0.1, embedding=0.1),
    dtype='float32',
    remat='full',
)
T5 = dataclasses.replace(
    TRANSFORMER,
    mlp='geglu',
    norm='rms',
    norm_place='pre',
    position='relative',
    bias=(),
    embed_scale=1.0,
    attention_scale=1.0,
    tied_embeddings=False,
    logit_scale=0.5,
)
BART = dataclasses.replace(
    TRANSFORMER,
    mlp='gelu_exact',
    position='learned',
    max_length=12,
    position_offset=2,
    embed_norm=True,
    bias=('qkv', 'out', 'mlp', 'head'),
)
# Two pairs in a row; each of them alone, padded on either side.
SOURCE_SEGMENTS = np.array([[1] * 6 + [2] * 3 + [0], [0] * 4 + [1] * 6, [1] * 3 + [0] * 7, [4] * 10])
TARGET_SEGMENTS = np.array([[1] * 3 + [2] * 5, [0] * 5 + [1] * 3, [1] * 5 + [0] * 3, [4] * 8])
SOURCE = np.array(toy.batch(SOURCE_SEGMENTS).tokens)
TARGET = np.array(toy.batch(TARGET_SEGMENTS, seed=1).tokens)
SOURCE[1, 4:], SOURCE[2, :3] = SOURCE[0, :6], SOURCE[0, 6:9]
TARGET[1, 5:], TARGET[2, :5] = TARGET[0, :3], TARGET[0, 3:]
PAIR = {'source_segments': SOURCE_SEGMENTS, 'target_segments': TARGET_SEGMENTS}


class Row:
    def __init__(self, config):
        self.config = config
        self.graph = toy.graph(config)
        self.weights = toy.weights(self.graph)
        self.logits = np.asarray(
            jax.jit(lambda weights: self.graph.bind(weights)(SOURCE, TARGET, **PAIR))(self.weights)
        )


@pytest.fixture(scope='module', params=[TRANSFORMER, T5, BART], ids=['transformer', 't5', 'bart'])
def row(request):
    return Row(request.param)


@pytest.fixture(scope='module')
def transformer():
    return Row(TRANSFORMER)


def test_the_transformer_is_that_of_plain_numpy(transformer):
    for i in range(4):
        for segment in set(TARGET_SEGMENTS[i]) - {0}:
            source, target = SOURCE[i][SOURCE_SEGMENTS[i] == segment], TARGET[i][TARGET_SEGMENTS[i] == segment]
            expected = numpy_transformer.logits(TRANSFORMER, transformer.weights, source, target)
            np.testing.assert_allclose(transformer.logits[i][TARGET_SEGMENTS[i] == segment], expected, atol=1e-5)


def test_pairs_packed_into_a_row_are_what_they_are_alone(row):
    np.testing.assert_allclose(row.logits[0, :3], row.logits[1, 5:], atol=1e-5)
    np.testing.assert_allclose(row.logits[0, 3:], row.logits[2, :5], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(row):
    source = np.where(SOURCE_SEGMENTS > 0, SOURCE, 1)
    target = np.where(TARGET_SEGMENTS > 0, TARGET, 1)
    run = jax.jit(lambda source, target: row.graph.bind(row.weights)(source, target, **PAIR))
    real = TARGET_SEGMENTS > 0
    np.testing.assert_array_equal(run(source, target)[real], run(SOURCE, TARGET)[real])


def cached(model):
    """Logits of the targets, three tokens at a time."""
    segments, positions = jnp.asarray(TARGET_SEGMENTS), from_segments(jnp.asarray(TARGET_SEGMENTS))
    encoded = model.encode(SOURCE, segments=SOURCE_SEGMENTS)
    cache, pieces = model.start_cache(encoded, 9, segments=SOURCE_SEGMENTS), []
    for start in (0, 3, 6):
        now = slice(start, start + 3)
        hidden, cache = model.extend(
            jnp.asarray(TARGET[:, now]), cache, segments=segments[:, now], positions=positions[:, now]
        )
        pieces.append(hidden)
    return model.logits(jnp.concatenate(pieces, axis=1))


def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(row):
    """With layers one by one; scanned, on a mesh, below."""
    real = TARGET_SEGMENTS > 0
    logits = jax.jit(lambda: cached(row.graph.bind(row.weights).unstacked()))()
    np.testing.assert_allclose(logits[real], row.logits[real], atol=1e-5)


def test_a_cache_lies_on_a_mesh(transformer):
    layout = toy.layout(fsdp=2, tensor=2).decoding

    @jax.jit
    def run(weights):
        with sharding.use(layout):
            model = transformer.graph.bind(weights)
            cache = model.start_cache(model.encode(SOURCE, segments=SOURCE_SEGMENTS), 9, segments=SOURCE_SEGMENTS)
            return cached(model), cache.layers[0].source.keys

    logits, keys = run(transformer.weights)
    real = TARGET_SEGMENTS > 0
    np.testing.assert_allclose(logits[real], transformer.logits[real], atol=1e-5)
    assert keys.shape == (3, 4, 4, 10, 6)  # L B K S H
    assert keys.sharding.shard_shape(keys.shape) == (3, 2, 2, 10, 6)


def loss(graph, weights, key=None):
    model = graph.bind(weights)
    logits = model.logits(model.hidden(SOURCE, TARGET, **PAIR, key=key))
    return -jnp.where(TARGET_SEGMENTS > 0, jax.nn.log_softmax(logits)[:, :, 3], 0.0).sum()


def test_every_parameter_has_a_gradient(row):
    gradients = jax.jit(jax.grad(lambda weights: loss(row.graph, weights)))(row.weights)
    for name, gradient in gradients.items():
        # A bias of keys adds the same to all scores of a query.
        assert (np.abs(gradient).max() > 1e-6) == (not name.endswith('key.bias')), name


def test_a_mesh_gives_the_loss_and_gradients_of_one_device():
    row, layout = Row(T5), toy.layout(fsdp=2, seq=2, tensor=2)
    step = jax.value_and_grad(lambda weights: loss(row.graph, weights))

    @jax.jit
    def placed(weights):
        with sharding.use(layout):
            return step(weights)

    leaves = row.graph.leaves
    one = jax.jit(step)(row.weights)
    several = placed({n: jax.device_put(w, param_sharding(layout, n, leaves[n])) for n, w in row.weights.items()})
    np.testing.assert_allclose(several[0], one[0], rtol=1e-5)
    for name, gradient in one[1].items():
        most = np.abs(gradient).max()
        np.testing.assert_allclose(several[1][name], gradient, atol=1e-5 * max(1.0, most), err_msg=name)


def test_dropout_is_drawn_by_the_key(transformer):
    run = jax.jit(lambda key: loss(transformer.graph, transformer.weights, key))
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert first == again != other


# ------------------------------------------------------------------------------------------------- generation


class Ids(ByteTokenizer):
    """Bytes in, but ids out: half a character would not tell which byte it was."""

    def decode(self, ids):
        return list(ids)


@pytest.fixture(scope='module')
def speaker():
    graph = toy.graph(dataclasses.replace(BART, vocab_size=270, max_length=24, start_token=5))
    return graph.bind(toy.weights(graph))


def test_prompts_are_sources_and_targets_come_back(speaker):
    """Greedy, against the whole model run anew for every token."""
    prompts, tokenizer = ['a', 'The quick'], Ids()
    texts = generate(speaker, tokenizer, prompts, max_new_tokens=6)
    run = jax.jit(lambda source, target, segments: speaker(source, target, target_segments=segments))
    for prompt, text in zip(prompts, texts, strict=True):
        source = np.array([[tokenizer.bos, *tokenizer.encode(prompt), tokenizer.eos]])
        target = np.full((1, 7), 5)
        for i in range(6):
            segments = (np.arange(7) <= i).astype(np.int32)[None]
            target[0, i + 1] = np.asarray(run(source, target, segments))[0, i, : tokenizer.vocab_size].argmax()
        new = target[0, 1:].tolist()
        assert text == new[: new.index(tokenizer.eos) if tokenizer.eos in new else 6]


def test_what_does_not_fit_is_refused(speaker):
    with pytest.raises(ConfigError, match='max_new_tokens = 30 are 30 tokens at most but the model has 24 learned'):
        generate(speaker, Ids(), ['a'], max_new_tokens=30)
    with pytest.raises(ConfigError, match='max_new_tokens = 4 are 32 tokens at most but the model has 24 learned'):
        generate(speaker, Ids(), ['a' * 30], max_new_tokens=4)
    cache = speaker.start_cache(jnp.zeros((1, 2, 16)), 2)
    three = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match='3 more tokens do not fit a cache of 2 slots'):
        speaker.extend(three, cache, segments=three, positions=three)
    with pytest.raises(ValueError, match='rows of 25 tokens are longer than the 24 learned positions'):
        speaker(np.ones((1, 25), np.int32), np.ones((1, 2), np.int32))


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'decoder_layers': 0}, 'decoder_layers is 0; it must be at least 1'),
        ({'encoder_layers': 0}, 'encoder_layers is 0; it must be at least 1'),
        ({'start_token': 19}, 'start_token = 19 is no token: vocab_size is 19'),
        (
            {'attention': 'splash', 'position': 'relative', 'dropout': None},
            "attention = 'splash' adds nothing to scores",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(TRANSFORMER, **changes).make()


@pytest.mark.parametrize('config', [TRANSFORMER, T5, BART], ids=['transformer', 't5', 'bart'])
def test_first_logits_are_of_order_one(config):
    """Whatever it is that scales embeddings, scores and logits."""
    model = initialise(dataclasses.replace(config, width=64, head_dim=32).make(), 0)
    logits = np.asarray(model(SOURCE, TARGET, **PAIR))
    assert 0.1 < logits.std() < 3

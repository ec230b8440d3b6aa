"""The encoder by itself: what sees what, its heads, training, and its bad inputs. Its numbers: tests/contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import Dropout
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.tower import as_rows
from tpu_llm.nn.param import param_sharding
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = EncoderConfig(
    vocab_size=19,
    width=16,
    layers=3,
    heads=4,
    mlp_width=24,
    max_length=12,
    position_offset=2,
    pooler=True,
    next_sentence=True,
    dropout=Dropout(residual=0.2, attention=0.1, embedding=0.1),
    dtype='float32',
    remat='full',
)
GRAPH = toy.graph(CONFIG)
WEIGHTS = toy.weights(GRAPH)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 4 + [3] * 8, [1] * 5 + [0] * 7, [0] * 8 + [1] * 4])
TOKENS = np.array(toy.batch(SEGMENTS).tokens)
TOKENS[2, :5], TOKENS[3, 8:] = TOKENS[0, :5], TOKENS[0, 5:9]
TYPES = np.arange(12)[None] // 3 % 2 * np.ones((4, 1), np.int64)
TYPES[2, :5], TYPES[3, 8:] = TYPES[0, :5], TYPES[0, 5:9]


class Given(nnx.Module):
    """An embedding that gives what it was made of."""

    def __init__(self, x):
        self.x = nnx.data(x)

    def __call__(self, tokens, dtype):
        return self.x


@pytest.fixture(scope='module')
def seen():
    """(hidden states, how much each depends on each place's token, pooled)"""

    @jax.jit
    def run(weights):
        def hidden(noise):
            model = GRAPH.bind(weights)
            model.embed = Given(jnp.take(weights['embed.table'], TOKENS, axis=0) + noise)
            return model.hidden(TOKENS, segments=SEGMENTS, token_types=TYPES)

        out, pull = jax.vjp(hidden, jnp.zeros((*TOKENS.shape, CONFIG.width)))
        at = jnp.eye(12)[:, None, :, None] * jax.random.normal(jax.random.key(1), out.shape)[None]
        influence = jnp.abs(jax.vmap(lambda cotangent: pull(cotangent)[0])(at)).max(axis=-1)
        return out, influence, GRAPH.bind(weights).pool(out, jnp.asarray(SEGMENTS))

    return jax.tree.map(np.asarray, run(WEIGHTS))


def test_a_token_sees_the_whole_of_its_segment_and_nothing_else(seen):
    depends = seen[1].swapaxes(0, 1) > 0
    np.testing.assert_array_equal(depends, SEGMENTS[:, :, None] == SEGMENTS[:, None, :])


def test_texts_packed_into_a_row_are_what_they_are_alone(seen):
    hidden = seen[0]
    np.testing.assert_allclose(hidden[0, :5], hidden[2, :5], atol=1e-5)
    np.testing.assert_allclose(hidden[0, 5:9], hidden[3, 8:], atol=1e-5)


def test_pooled_is_made_of_the_first_token_that_is_not_padding(seen):
    hidden, _, pooled = seen
    first = hidden[[0, 1, 2, 3], [0, 4, 0, 8]]
    expected = np.tanh(first @ np.asarray(WEIGHTS['pooler.kernel']) + np.asarray(WEIGHTS['pooler.bias']))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_no_type_is_the_first():
    model = GRAPH.bind(WEIGHTS)
    zeros = np.zeros_like(TOKENS)
    np.testing.assert_array_equal(model.hidden(TOKENS), model.hidden(TOKENS, token_types=zeros))
    assert np.abs(model.hidden(TOKENS) - model.hidden(TOKENS, token_types=zeros + 1)).max() > 0.1


def loss(weights, key):
    """Of both heads."""
    model = GRAPH.bind(weights)
    hidden = model.hidden(TOKENS, segments=SEGMENTS, token_types=TYPES, key=key)
    masked = jnp.where(SEGMENTS > 0, jax.nn.log_softmax(model.logits(model.transformed(hidden)))[:, :, 3], 0.0)
    pairs = jax.nn.log_softmax(model.next_sentence(model.pool(hidden, jnp.asarray(SEGMENTS))))[:, 0]
    return -masked.sum() - pairs.sum()


def test_every_parameter_has_a_gradient_and_layouts_agree():
    one = jax.jit(jax.value_and_grad(loss))(WEIGHTS, None)
    for name, gradient in one[1].items():
        # A bias of keys adds the same to all scores of a query.
        assert (np.abs(gradient).max() > 1e-6) == (not name.endswith('attention.key.bias')), name
    for axes in ({'fsdp': 2, 'tensor': 2}, {'data': 2, 'seq': 2}):
        layout = toy.layout(**axes)
        params = {n: jax.device_put(w, param_sharding(layout, n, GRAPH.leaves[n])) for n, w in WEIGHTS.items()}

        def placed(weights, layout=layout):
            with sharding.use(layout):
                return jax.value_and_grad(loss)(weights, None)

        several = jax.jit(placed)(params)
        np.testing.assert_allclose(several[0], one[0], rtol=1e-5)
        for name, gradient in one[1].items():
            np.testing.assert_allclose(several[1][name], gradient, atol=1e-5 * max(1.0, np.abs(gradient).max()))


def test_dropout_is_drawn_by_the_key():
    run = jax.jit(loss)
    first, again, other = (
        run(WEIGHTS, jax.random.key(0)),
        run(WEIGHTS, jax.random.key(0)),
        run(WEIGHTS, jax.random.key(1)),
    )
    assert first == again != other


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'heads': 3}, 'width = 16 is not divisible by heads = 3'),
        ({'token_types': 0}, 'token_types is 0; it must be at least 1'),
        ({'pooler': False}, 'next_sentence looks at what the pooler makes; set pooler = True'),
        ({'max_length': 0}, "max_length = 0 with position = 'learned'"),
        ({'mlp': 'swiglu'}, 'mlp'),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **changes).make()


def test_what_is_not_there_is_said():
    bare = toy.graph(dataclasses.replace(CONFIG, masked_head=False, pooler=False, next_sentence=False))
    model = bare.bind(toy.weights(bare))
    with pytest.raises(ValueError, match='no head for masked tokens; build it with masked_head = True'):
        model(TOKENS)
    with pytest.raises(ValueError, match='no pooler; build it with pooler = True'):
        model.pooled(TOKENS)
    with pytest.raises(ValueError, match='no head for pairs of texts; build it with next_sentence = True'):
        model.next_sentence(jnp.zeros((1, 16)))


def test_bad_rows_are_refused():
    model = GRAPH.bind(WEIGHTS)
    with pytest.raises(ValueError, match=r'tokens of shape \[12\]: give rows'):
        model(TOKENS[0])
    with pytest.raises(ValueError, match=r'segments of shape \[4, 11\] for tokens of shape \[4, 12\]'):
        as_rows(TOKENS, SEGMENTS[:, 1:])
    with pytest.raises(ValueError, match='rows of 13 tokens are longer than the 12 learned positions'):
        model(np.ones((1, 13), np.int32))

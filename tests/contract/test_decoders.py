"""What every decoder must do, whatever it is composed of. A new architecture is one more row of DECODERS.

Tolerances: 1e-5 on logits and hidden states of order 1, float32 against float64 or against another order of the
same sums.
"""

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import toy
from flax import nnx

from tpu_llm.models.decoder import Decoder, DecoderConfig, Dropout
from tpu_llm.models.graph import ModelGraph

pytestmark = pytest.mark.usefixtures('quick_compile')

DECODERS = {
    'llama': toy.config(),
    'multi-query': toy.config(kv_heads=1, norm_eps=1e-2),
    'gpt2': toy.config(
        kv_heads=4,
        mlp='gelu',
        norm='layer',
        norm_eps=1e-5,
        position='learned',
        max_length=12,
        tied_embeddings=True,
        bias=True,
    ),
    'vaswani': toy.config(kv_heads=4, mlp='relu', norm='layer', norm_place='post', position='sinusoidal', bias=True),
    'windows': toy.config(layers=5, windows=(2, 0), rope_theta=100.0),
    'gemma': toy.config(mlp='geglu', logit_softcap=1.5, attention_softcap=0.7, tied_embeddings=True),
    'dropout': toy.config(position='none', dropout=Dropout(residual=0.2, attention=0.3, embedding=0.1)),
}

# Two documents and padding; each of them alone, padded on either side.
SEGMENTS = np.array(
    [
        [1] * 5 + [2] * 4 + [0] * 3,
        [1] * 5 + [0] * 7,
        [0] * 8 + [1] * 4,
        [3] * 12,
    ]
)


class Row:
    """A row of the table with weights, a batch, and what several tests need of it computed once."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.graph = toy.graph(config)
        self.weights = toy.weights(self.graph)
        batch = toy.batch(SEGMENTS)
        tokens = np.array(batch.tokens)
        tokens[1, :5], tokens[2, 8:] = tokens[0, :5], tokens[0, 5:9]
        self.batch = dataclasses.replace(batch, tokens=jnp.asarray(tokens))
        self.real = SEGMENTS > 0
        self.run = jax.jit(lambda weights, b: self.bind(weights)(b.tokens, segments=b.segments, positions=b.positions))

    def bind(self, weights=None) -> Decoder:
        return self.graph.bind(self.weights if weights is None else weights)

    @cached_property
    def logits(self) -> np.ndarray:
        return np.asarray(self.run(self.weights, self.batch))


@pytest.fixture(scope='module', params=DECODERS)
def row(request):
    return Row(DECODERS[request.param])


def test_logits_are_those_of_plain_numpy(row):
    b = row.batch
    expected = numpy_decoder.logits(row.config, row.weights, b.tokens, b.segments, b.positions)
    assert row.logits.dtype == np.float32
    np.testing.assert_allclose(row.logits, expected, atol=1e-5)


def test_documents_packed_into_a_row_do_not_see_each_other(row):
    np.testing.assert_allclose(row.logits[0, :5], row.logits[1, :5], atol=1e-5)
    np.testing.assert_allclose(row.logits[0, 5:9], row.logits[2, 8:], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(row):
    tokens = np.where(row.real, row.batch.tokens, (row.batch.tokens + 1) % 19)
    again = row.run(row.weights, dataclasses.replace(row.batch, tokens=jnp.asarray(tokens)))
    np.testing.assert_array_equal(np.asarray(again)[row.real], row.logits[row.real])


class Given(nnx.Module):
    """An embedding that gives what it was made of."""

    def __init__(self, x):
        self.x = nnx.data(x)

    def __call__(self, tokens, dtype):
        return self.x


def test_a_hidden_state_depends_on_what_the_masks_let_through_and_on_nothing_else(row):
    b, config = row.batch, row.config

    @jax.jit
    def influences(x):
        """[t, row, s]: how much the hidden state at t depends on the embedding at s."""

        def hidden(x):
            model = row.bind()
            model.embed = Given(x)
            return model.hidden(b.tokens, segments=b.segments, positions=b.positions)

        direction = jax.random.normal(jax.random.key(1), x.shape)
        _, pull = jax.vjp(hidden, x)
        at = jnp.eye(x.shape[1])[:, None, :, None] * direction[None]
        return jnp.abs(jax.vmap(lambda cotangent: pull(cotangent)[0])(at)).max(axis=-1)

    x = jax.random.normal(jax.random.key(0), (*b.tokens.shape, config.width))
    depends = np.asarray(influences(x)).swapaxes(0, 1) > 0
    for i, segments in enumerate(SEGMENTS):
        reach = np.eye(len(segments), dtype=bool)
        for layer in range(config.layers):
            window = config.windows[layer % len(config.windows)]
            reach = (
                numpy_decoder.seen(segments, np.asarray(b.positions[i]), window) | np.eye(len(segments), dtype=bool)
            ) @ reach
        np.testing.assert_array_equal(depends[i], reach)


def test_a_cache_filled_in_pieces_gives_the_hidden_states_of_the_whole(row):
    b = row.batch

    @jax.jit
    def whole(tokens, segments, positions):
        return row.bind().hidden(tokens, segments=segments, positions=positions)

    @jax.jit
    def piece(cache, tokens, segments, positions):
        return row.bind().extend(tokens, cache, segments=segments, positions=positions)

    cache, pieces = row.bind().empty_cache(4, 15), []
    for start in (0, 4, 8):
        now = slice(start, start + 4)
        hidden, cache = piece(cache, b.tokens[:, now], b.segments[:, now], b.positions[:, now])
        pieces.append(hidden)
    together = np.concatenate(pieces, axis=1)
    expected = np.asarray(whole(b.tokens, b.segments, b.positions))
    np.testing.assert_allclose(together[row.real], expected[row.real], atol=1e-5)


def test_layers_one_by_one_are_the_scanned_ones(row):
    b = row.batch
    unstacked = jax.jit(lambda weights: row.bind(weights).unstacked()(b.tokens, segments=b.segments))
    np.testing.assert_allclose(unstacked(row.weights), row.logits, atol=1e-5)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_bfloat16_computes_nearly_the_same(name):
    row = Row(DECODERS[name])
    coarse = Row(dataclasses.replace(row.config, dtype='bfloat16'))
    assert coarse.logits.dtype == np.float32
    error = (coarse.logits - row.logits).std() / row.logits.std()
    assert 1e-3 < error < 5e-2  # a rounding to 8 bits is off by up to 0.4 %


# --------------------------------------------------------------------------- at the sizes that were published

PUBLISHED = {
    'Llama-2-7B': (
        {'vocab_size': 32_000, 'width': 4096, 'layers': 32, 'heads': 32, 'kv_heads': 32, 'head_dim': 128}
        | {'mlp_width': 11_008},
        6_738_415_616,
    ),
    'Llama-2-70B': (
        {'vocab_size': 32_000, 'width': 8192, 'layers': 80, 'heads': 64, 'kv_heads': 8, 'head_dim': 128}
        | {'mlp_width': 28_672},
        68_976_648_192,
    ),
    'Llama-3.1-8B': (
        {'vocab_size': 128_256, 'width': 4096, 'layers': 32, 'heads': 32, 'kv_heads': 8, 'head_dim': 128}
        | {'mlp_width': 14_336, 'rope_theta': 500_000.0},
        8_030_261_248,
    ),
    'GPT-2': (
        {'vocab_size': 50_257, 'width': 768, 'layers': 12, 'heads': 12, 'kv_heads': 12, 'head_dim': 64}
        | {'mlp_width': 3072, 'mlp': 'gelu', 'norm': 'layer', 'position': 'learned', 'max_length': 1024}
        | {'tied_embeddings': True, 'bias': True},
        124_439_808,
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_their_published_parameters_and_run_in_the_abstract(name):
    fields, parameters = PUBLISHED[name]
    graph = ModelGraph(DecoderConfig(**fields).make())
    assert graph.count() == parameters
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    logits = jax.eval_shape(lambda weights, tokens: graph.bind(weights)(tokens), graph.shapes(), tokens)
    assert logits.shape == (2, 1024, fields['vocab_size'])
    assert logits.dtype == jnp.float32

"""What every decoder must do, whatever it is composed of. A new architecture is one more row of DECODERS.

Tolerances: 1e-5 on logits and hidden states of order 1, float32 against float64 or against another order of the
same sums.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import toy
from flax import nnx

from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.rope_scaling import NTK, DynamicNTK, Linear, Llama3, LongRope, YaRN
from tpu_llm.nn.router import Router

pytestmark = pytest.mark.usefixtures('quick_compile')

SOFTMAX = Router(choice='softmax_then_topk')
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
        bias=('qkv', 'out', 'mlp'),
    ),
    'vaswani': toy.config(
        kv_heads=4, mlp='relu', norm='layer', norm_place='post', position='sinusoidal', bias=('qkv', 'out', 'mlp')
    ),
    'windows': toy.config(layers=5, windows=(2, 0), rope_theta=100.0),
    'gemma-2': toy.config(
        mlp='geglu',
        norm_place='both',
        windows=(4, 0),
        logit_softcap=1.5,
        attention_softcap=0.7,
        attention_scale=0.3,
        tied_embeddings=True,
        embed_scale=1.7,
    ),
    'palm': toy.config(kv_heads=1, norm='layer_no_bias', residual='parallel', tied_embeddings=True, embed_scale=4.0),
    'dropout': toy.config(position='none', dropout=Dropout(residual=0.2, attention=0.3, embedding=0.1)),
    'mixtral': toy.config(moe=MoE(experts=4, chosen=2, expert_width=12)),
    'gemma-3': toy.config(
        layers=2,
        mlp='geglu_exact',
        norm='rms_offset',
        norm_place='both',
        windows=(3, 0),
        rope_theta=1000.0,
        local_rope_theta=50.0,
        rope_scaling=Linear(factor=4.0),
        qk_norm='head',
        tied_embeddings=True,
    ),
    'olmo-2': toy.config(layers=2, norm_place='out', qk_norm='all_heads', mlp='reglu'),
    'neox': toy.config(
        layers=2,
        kv_heads=4,
        mlp='gelu_exact',
        norm='layer',
        residual='parallel_two_norms',
        rope_dim=2,
        bias=('qkv', 'out', 'mlp', 'head'),
    ),
    'cohere': toy.config(
        layers=2, norm='layer_no_bias', residual='parallel', qk_norm='each_head', logit_scale=0.25, tied_embeddings=True
    ),
    # Heads that are no power of two, grouped; and what is added to scores is not capped.
    'bloom': toy.config(
        layers=2,
        heads=6,
        kv_heads=3,
        mlp='gelu',
        norm='layer',
        position='alibi',
        embed_norm=True,
        attention_softcap=0.7,
        tied_embeddings=True,
        bias=('qkv', 'out', 'mlp', 'head'),
        logit_scale=1.5,
        logit_softcap=2.0,
    ),
    'cohere-2': toy.config(
        layers=5, norm='layer', windows=(4, 4, 0), rope_layers=(True, True, False), rope_theta=100.0
    ),
    'qwen2-moe': toy.config(
        layers=2, moe=MoE(experts=4, chosen=2, expert_width=12, shared=2, shared_gate=True, router=SOFTMAX)
    ),
    'transformer-xl': toy.config(kv_heads=4, mlp='gelu', position='transformer_xl', tied_embeddings=True),
    't5': toy.config(layers=2, mlp='relu', position='relative', attention_scale=1.0, windows=(0, 9)),
    'deepseek-v3': toy.config(
        kv_heads=4,
        rope_theta=30.0,
        rope_scaling=YaRN(factor=4.0, original_length=20, beta_fast=4.0, attention_factor=1.1),
        mla=MLA(kv_rank=12, query_rank=20, rope_dim=4, value_dim=6),
        moe=MoE(
            experts=8,
            chosen=3,
            expert_width=12,
            shared=1,
            first_dense=1,
            router=Router(choice='sigmoid', groups=4, chosen_groups=2, scale=2.5, bias_rate=0.001),
        ),
    ),
    'deepseek-v2': toy.config(
        windows=(0, 5),
        kv_heads=4,
        attention_scale=0.25,
        mla=MLA(kv_rank=12, rope_dim=6, value_dim=5, norm_eps=0.1),
        moe=MoE(
            experts=8,
            chosen=3,
            expert_width=12,
            shared=2,
            first_dense=1,
            router=Router(choice='softmax_then_topk', groups=4, chosen_groups=2, scale=16.0),
        ),
    ),
    'qwen3-moe': toy.config(
        qk_norm='head',
        moe=MoE(experts=8, chosen=3, expert_width=12, router=Router(choice='softmax_then_topk', normalise=True)),
    ),
    # As many places as tokens, even if all choose the same expert.
    'glam': toy.config(
        mlp='geglu', moe=MoE(experts=4, chosen=2, expert_width=20, mlp='gelu', every=2, capacity=2.0, router=SOFTMAX)
    ),
    'switch': toy.config(mlp='relu', moe=MoE(experts=4, chosen=1, expert_width=12, capacity=1.0, router=SOFTMAX)),
    'gshard': toy.config(mlp='gelu', moe=MoE(experts=4, chosen=2, expert_width=12, capacity=0.75)),
    'expert choice': toy.config(
        moe=MoE(experts=4, chosen=2, expert_width=12, capacity=0.5, router=Router(choice='expert_choice'))
    ),
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

    @functools.cached_property
    def logits(self) -> np.ndarray:
        return np.asarray(self.run(self.weights, self.batch))


@functools.cache
def make_row(name):
    return Row(DECODERS[name])


@pytest.fixture(params=DECODERS)
def row(request):
    return make_row(request.param)


def competes(config):
    """Whether the tokens of a row compete for places in experts: what one of them gets then depends on all others."""
    return bool(config.moe) and 0 < config.moe.capacity * config.moe.chosen < config.moe.experts


ALONE = [name for name, config in DECODERS.items() if not competes(config)]
each_token_alone = pytest.mark.parametrize('row', ALONE, indirect=True)


def test_logits_are_those_of_plain_numpy(row):
    b = row.batch
    expected = numpy_decoder.logits(row.config, row.weights, b.tokens, b.segments, b.positions)
    assert row.logits.dtype == np.float32
    np.testing.assert_allclose(row.logits, expected, atol=1e-5)


# One layer, against NumPy alone. In the last two what a token is given depends on the length of its row.
FURTHER = [
    {'residual': 'parallel', 'norm_place': 'both'},
    {'residual': 'parallel', 'norm_place': 'post', 'norm': 'layer'},
    {'residual': 'parallel_two_norms', 'norm_place': 'both', 'norm': 'layer_no_bias'},
    {'qk_norm': 'all_heads', 'norm': 'layer', 'bias': ('qkv',)},
    {
        'residual': 'parallel',
        'norm_place': 'out',
        'rope_theta': 100.0,
        'rope_scaling': Llama3(factor=8.0, original_length=20),
    },
    {'qk_norm': 'each_head', 'norm': 'rms_offset'},
    {'position': 'transformer_xl', 'windows': (4,), 'attention_scale': 0.3, 'bias': ('qkv',)},
    {'qk_norm': 'head_biased', 'norm': 'layer', 'residual': 'parallel', 'rope_dim': 4},
    {'layers': 4, 'rope_layers': (False, True, True), 'windows': (0, 4), 'local_rope_theta': 7.0},
    {'position': 'alibi', 'heads': 6, 'kv_heads': 3, 'alibi_max': 5.0, 'alibi_scale': 0.4},
    {'embed_width': 10, 'norm_place': 'post', 'norm': 'layer', 'tied_embeddings': True},
    {'embed_width': 24, 'bias': ('head',)},
    {'position': 'relative_each', 'layers': 3, 'windows': (0, 9)},
    {'qk_norm': 'each_head', 'norm': 'layer_fixed', 'qkv_clip': 0.7},
    {'position': 'learned', 'max_length': 12, 'position_offset': 2, 'bias': ('out',)},
    {'rope_scaling': NTK(factor=4.0), 'rope_dim': 4},
    {'rope_scaling': YaRN(factor=4.0, original_length=100, truncate=False), 'local_rope_theta': 7.0, 'windows': (4,)},
    {'rope_scaling': DynamicNTK(factor=4.0, original_length=4), 'rope_dim': 4},
    {'rope_scaling': LongRope(short=(1.0, 1.5, 3.0), long=(2.0, 4.0, 6.0), original_length=6, attention_factor=1.2)},
]


@pytest.mark.parametrize('changes', FURTHER, ids=str)
def test_further_ways_to_compose_it_are_those_of_plain_numpy(changes):
    row = Row(toy.config(**{'layers': 1, **changes}))
    b = row.batch
    expected = numpy_decoder.logits(row.config, row.weights, b.tokens, b.segments, b.positions)
    np.testing.assert_allclose(row.logits, expected, atol=1e-5)


@each_token_alone
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


@each_token_alone
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


@each_token_alone
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


@pytest.mark.parametrize('name', [name for name, config in DECODERS.items() if config.moe])
def test_choices_are_dropped_where_places_are_few(name):
    row = make_row(name)
    routing = row.bind().routed(row.batch.tokens, segments=row.batch.segments)[1]
    assert (routing.dropped > 0).any() == competes(row.config)


def test_the_bias_changes_choices():
    row = make_row('deepseek-v3')
    flat = {name: jnp.zeros_like(w) if name.endswith('router.bias') else w for name, w in row.weights.items()}
    assert np.abs(row.run(flat, row.batch) - row.logits).max() > 0.1


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mixtral'])
def test_bfloat16_computes_nearly_the_same(name):
    row = Row(DECODERS[name])
    coarse = Row(dataclasses.replace(row.config, dtype='bfloat16'))
    assert coarse.logits.dtype == np.float32
    error = (coarse.logits - row.logits).std() / row.logits.std()
    assert 1e-3 < error < 5e-2  # a rounding to 8 bits is off by up to 0.4 %

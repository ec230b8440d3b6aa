"""What changes a decoder's memory and speed but not its numbers, dropout, and the configs that cannot be."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError, dump, load
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import Dropout
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.rope_scaling import DynamicNTK, Linear, LongRope
from tpu_llm.objectives.next_token import NextToken

pytestmark = pytest.mark.usefixtures('quick_compile')

DROPOUT = Dropout(residual=0.2, attention=0.2, embedding=0.1)
CONFIG = toy.config(
    windows=(3,),
    kv_heads=1,
    mlp='geglu',
    bias=('qkv', 'out', 'mlp'),
    norm_place='both',
    residual='parallel',
    dropout=DROPOUT,
)
BATCH = toy.batch(np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8]))
WEIGHTS = toy.weights(toy.graph(CONFIG))

# What a layer saves, and how many layers a step of the scan runs.
MACHINE = [('none', 2), ('full', 1), ('dots', 0), ('query+key+value', 2), ('mlp_out+gate', 1), ('gate+up@host', 1)]


def loss_of(remat='none', unroll=1):
    graph = toy.graph(dataclasses.replace(CONFIG, remat=remat, unroll=unroll))

    def loss(weights, key):
        return NextToken()(graph.bind(weights), BATCH, frozen=None, key=key, step=jnp.int32(0))[0]

    return loss


@pytest.fixture(scope='module')
def plain():
    return jax.jit(jax.value_and_grad(loss_of()))(WEIGHTS, jax.random.key(0))


@pytest.mark.parametrize(('remat', 'unroll'), MACHINE)
def test_what_is_saved_and_unrolled_changes_neither_loss_nor_gradients(plain, remat, unroll):
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(remat, unroll)))(WEIGHTS, jax.random.key(0))
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, plain[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def matmuls(jaxpr) -> int:
    """dot_generals in a program, those of the programs inside it included."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns'))]
    inner = [getattr(p, 'jaxpr', p) for p in inner if hasattr(p, 'eqns')]
    return sum(eqn.primitive.name == 'dot_general' for eqn in jaxpr.eqns) + sum(map(matmuls, inner))


def test_the_less_is_saved_the_more_is_computed_again():
    policies = ['none', 'dots', 'attended+gate+up+attention_out', 'attended+gate+up', 'full']
    counts = [matmuls(jax.make_jaxpr(jax.grad(loss_of(remat)))(WEIGHTS, jax.random.key(0)).jaxpr) for remat in policies]
    assert counts == sorted(set(counts))


# ------------------------------------------------------------------------------------------------- dropout


def hidden(config, key, weights=WEIGHTS, *, unstacked=False):
    def run(weights, key):
        model = toy.graph(config).bind(weights)
        return (model.unstacked() if unstacked else model).hidden(BATCH.tokens, key=key)

    return np.asarray(jax.jit(run)(weights, key))


@pytest.fixture(scope='module')
def dropped():
    return hidden(CONFIG, jax.random.key(0))


def test_dropout_is_a_function_of_its_key(dropped):
    np.testing.assert_array_equal(hidden(CONFIG, jax.random.key(0)), dropped)
    assert np.abs(hidden(CONFIG, jax.random.key(1)) - dropped).max() > 0.1


def test_dropout_is_the_same_scanned_or_not(dropped):
    np.testing.assert_allclose(hidden(CONFIG, jax.random.key(0), unstacked=True), dropped, atol=1e-5)


def test_without_a_key_nothing_is_dropped():
    np.testing.assert_array_equal(
        hidden(CONFIG, None), hidden(dataclasses.replace(CONFIG, dropout=None), jax.random.key(0))
    )


def test_layers_drop_different_entries():
    config = toy.config(layers=2, mlp='relu', bias=('mlp',), dropout=Dropout(residual=0.5))
    zero = {name: jnp.zeros_like(w) for name, w in toy.weights(toy.graph(config)).items()}
    ones = {name: jnp.ones_like(w) for name, w in zero.items() if name.endswith(('.scale', 'mlp.down.bias'))}
    out = hidden(config, jax.random.key(0), zero | ones)  # each layer adds 0 or 2 to an entry
    shares = out / out.max(axis=-1, keepdims=True)
    assert set(np.round(shares, 3).ravel().tolist()) == {0.0, 0.5, 1.0}


# ------------------------------------------------------------------------------------------------- positions and heads


@pytest.mark.parametrize('tied', [True, False])
def test_the_loss_in_chunks_sees_the_heads_bias_and_scale(tied):
    config = toy.config(layers=1, bias=('head',), logit_scale=0.5, logit_softcap=2.0, tied_embeddings=tied)
    graph = toy.graph(config)
    weights = toy.weights(graph)
    assert ('head.kernel' in weights) != tied
    logits = jax.jit(lambda weights: graph.bind(weights)(BATCH.tokens, segments=BATCH.segments))(weights)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(BATCH.targets)[..., None], -1)[..., 0]

    def loss(weights):
        return NextToken(chunk=3)(graph.bind(weights), BATCH, frozen=None, key=None, step=jnp.int32(0))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(weights)
    np.testing.assert_allclose(value, -(log_p * BATCH.weights).sum(), rtol=1e-5)
    assert np.abs(gradients['head.bias'][:19]).min() > 0


def test_rows_before_the_first_learned_position_are_never_read():
    config = toy.config(layers=1, position='learned', max_length=8, position_offset=2)
    graph = toy.graph(config)
    weights = toy.weights(graph)
    assert weights['position_embed.table'].shape == (10, 16)
    model = graph.bind(weights | {'position_embed.table': weights['position_embed.table'].at[:2].set(jnp.nan)})
    assert jnp.isfinite(model(BATCH.tokens)).all()


def test_rope_is_stretched_by_setting_it_on_the_config_of_a_trained_model():
    """Positions interpolated by 2: the even positions of a row turn as the first half of them did."""
    graph = toy.graph(toy.config(layers=1))
    weights = toy.weights(graph)
    longer = load(dump(toy.config(layers=1)))
    longer.rope_scaling = Linear(factor=2.0)
    tokens, positions = BATCH.tokens[1:], jnp.arange(8)[None]
    stretched = toy.graph(longer).bind(weights)(tokens, positions=2 * positions)
    np.testing.assert_allclose(stretched, graph.bind(weights)(tokens, positions=positions), atol=1e-5)
    assert np.abs(graph.bind(weights)(tokens, positions=2 * positions) - stretched).max() > 0.01


def test_a_model_keeps_its_own_way_to_stretch_rope():
    """Whatever becomes of the config; and lists, of which a config file may be made, do not make it unhashable."""
    config = toy.config(layers=1, rope_scaling=Linear(factor=2.0))
    graph = toy.graph(config)
    config.rope_scaling.factor = 4.0
    assert graph.bind(graph.shapes()).rope_scaling == Linear(factor=2.0)
    lists = LongRope(short=[1.0] * 3, long=[2.0] * 3, original_length=4, attention_factor=1.0)
    hash(toy.graph(toy.config(layers=1, rope_scaling=lists)).graph)


@pytest.mark.parametrize(
    'scaling',
    [
        DynamicNTK(factor=4.0, original_length=6),
        LongRope(short=(1.0, 1.5, 3.0), long=(2.0, 4.0, 6.0), original_length=6, attention_factor=1.2),
    ],
    ids=['DynamicNTK', 'LongRope'],
)
def test_a_row_no_longer_than_the_original_length_decodes_as_it_is_read(scaling):
    """Padded on the left, and behind it another that is short: each row has its own length."""
    graph = toy.graph(toy.config(layers=1, rope_scaling=scaling))
    model = graph.bind(toy.weights(graph))
    extend = jax.jit(lambda *now: model.extend(*now[:2], segments=now[2], positions=now[3]))
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
    batch = toy.batch(segments)
    whole = jax.jit(lambda b: model.hidden(b.tokens, segments=b.segments, positions=b.positions))(batch)
    cache, parts = model.empty_cache(2, 8), []
    for now in (slice(0, 4), slice(4, 8)):
        hidden, cache = extend(batch.tokens[:, now], cache, batch.segments[:, now], batch.positions[:, now])
        parts.append(hidden)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[real], whole[real], atol=1e-5)


# ------------------------------------------------------------------------------------------------- the edges


def test_an_embedding_table_too_short_for_the_row_is_an_error():
    graph = toy.graph(toy.config(position='learned', max_length=7))
    with pytest.raises(ValueError, match='rows of 8 tokens are longer than the 7 learned positions'):
        graph.bind(toy.weights(graph))(BATCH.tokens)


def test_what_a_full_cache_has_no_room_for_is_an_error_or_not_a_number():
    graph = toy.graph(toy.config(layers=1))
    model, ones = graph.bind(toy.weights(graph)), jnp.ones((1, 4), jnp.int32)

    def extend(cache, tokens):
        return model.extend(tokens, cache, segments=tokens, positions=tokens)

    hidden, cache = jax.jit(extend)(model.empty_cache(1, 6), ones)
    assert jnp.isfinite(hidden).all()
    with pytest.raises(ValueError, match='4 more tokens do not fit a cache of 6 slots, 4 of them used; make it longer'):
        extend(cache, ones)
    assert jnp.isnan(jax.jit(extend)(cache, ones)[0]).all()  # compiled, the index is not known
    assert jnp.isfinite(jax.jit(extend)(cache, ones[:, :2])[0]).all()


def test_host_arrays_are_welcome():
    graph = toy.graph(toy.config(layers=1))
    tokens, segments = np.ones((1, 3), np.int32), np.ones((1, 3), np.int32)
    assert graph.bind(toy.weights(graph))(tokens, segments=segments).shape == (1, 3, 19)


WRONG = [
    ({'heads': 6, 'kv_heads': 4}, 'heads = 6 is not divisible by kv_heads = 4; each key-value head serves'),
    ({'layers': 0}, 'layers is 0; it must be at least 1'),
    ({'head_dim': 5}, 'head_dim = 5 is odd; rope turns pairs, so make it even'),
    (
        {'width': 15, 'position': 'sinusoidal'},
        "width = 15 is odd; the sinusoids of 'sinusoidal' positions need it even",
    ),
    (
        {'width': 15, 'position': 'transformer_xl'},
        "width = 15 is odd; the sinusoids of 'transformer_xl' positions need it",
    ),
    ({'position': 'learned'}, "max_length = 0 with position = 'learned'; write how many positions there are"),
    ({'max_length': -1}, "max_length = -1 with position = 'rope'; .* the longest text the model is made for, or 0"),
    ({'windows': ()}, r'windows = \(\); write one window a layer of the period, 0 for none'),
    ({'windows': (4, -1)}, r'windows = \(4, -1\); write one window'),
    ({'attention': 'flash'}, "attention = 'flash'; there are auto, xla, .*reference"),
    ({'unroll': -1}, 'unroll = -1; it must be at least 0'),
    ({'norm_eps': 0.0}, 'norm_eps = 0.0 and rope_theta = 10000.0 must be above 0'),
    ({'rope_theta': 0.0}, 'norm_eps = 1e-06 and rope_theta = 0.0 must be above 0'),
    ({'embed_scale': 0.0}, 'embed_scale = 0.0 must be above 0, 1 for none, and attention_scale = 0.0 not negative'),
    ({'attention_scale': -1.0}, 'embed_scale = 1.0 .* attention_scale = -1.0 not negative, 0 for 1 / sqrt'),
    ({'logit_softcap': -1.0}, 'logit_softcap = -1.0 and attention_softcap = 0.0 must not be negative; 0 is none'),
    (
        {'attention': 'reference', 'dropout': Dropout(attention=0.1)},
        "attention = 'reference' drops nothing, but dropout.attention is 0.1; set it to 0 or choose another attention",
    ),
    (
        {'attention': 'blockwise', 'position': 'alibi'},
        "attention = 'blockwise' adds nothing to scores, but position = 'alibi' asks for it; set .* 'auto' or 'xla' or",
    ),
    (
        {'sequence': 'ring', 'position': 'relative'},
        "sequence = 'ring' adds nothing to scores, but position = 'relative' asks for it; set sequence to 'gather'",
    ),
    ({'embed_width': -1}, 'embed_width = -1 must not be negative; 0 is the width'),
    (
        {'alibi_max': 16.0},
        "alibi_max = 16.0 and alibi_scale = 1.0 with position = 'rope'; they are above 0, and 8 and 1",
    ),
    ({'position': 'alibi', 'alibi_scale': 0.0}, 'alibi_scale = 0.0 with .* they are above 0'),
    ({'qkv_clip': -1.0}, 'qkv_clip = -1.0 must not be negative; 0 is none'),
    ({'logit_scale': 0.0}, 'logit_scale = 0.0 must be above 0; 1 is none'),
    (
        {'residual': 'parallel_two_norms', 'norm_place': 'out'},
        "residual = 'parallel_two_norms' norms what attention and MLP take, but norm_place = 'out' norms only",
    ),
    ({'bias': ('qkv', 'mlp', 'qkv')}, r"bias = \('qkv', 'mlp', 'qkv'\) names a place twice; write it once"),
    ({'bias': True}, r'^model\.bias is True; expected tuple'),
    (
        {'rope_layers': (False,)},
        r"rope_layers = \(False,\) names the layers that position = 'rope' turns, at least one of",
    ),
    ({'rope_layers': (True, False), 'position': 'alibi'}, 'and all of them with another scheme'),
    (
        {'kv_heads': 4, 'mla': MLA(kv_rank=8, rope_dim=4, value_dim=6, norm_eps=-1.0)},
        "norm_eps is -1.0; it must not be negative, 0 is the decoder's",
    ),
    ({'qk_norm': 'head_biased'}, "qk_norm = 'head_biased' is a layer norm, and norm = 'rms'; set qk_norm = 'head'"),
    ({'moe': MoE(experts=2, chosen=1, expert_width=4, shared_gate=True)}, 'gates shared experts, and moe.shared = 0'),
    ({'rope_dim': 3}, 'rope_dim = 3 is odd; rope turns pairs, so make it even'),
    ({'rope_dim': 8}, 'rope_dim = 8; it is a part of head_dim = 6, 0 for all of it'),
    (
        {'rope_dim': 2, 'kv_heads': 4, 'mla': MLA(kv_rank=8, rope_dim=4, value_dim=6)},
        'rope_dim = 2; it is .* 0 with mla, which has a rope_dim of its own',
    ),
    ({'local_rope_theta': 10.0}, r'local_rope_theta = 10.0 is the base of layers with a window, and windows = \(0,\)'),
    (
        {'position': 'none', 'rope_scaling': Linear(factor=2.0)},
        "position = 'none' turns nothing: leave out rope_dim, local_rope_theta and rope_scaling",
    ),
    (
        {'rope_scaling': LongRope(short=(1.0,), long=(1.0,), original_length=8, attention_factor=1.0)},
        'rope_scaling has 1 factors for the 3 pairs that turn; write one a pair',
    ),
    (
        {'rope_scaling': Linear(factor=0.5)},
        r'^model\.rope_scaling: Linear\.factor is 0\.5; it is how many times longer',
    ),
    ({'position_offset': 2}, "position_offset = 2 with position = 'rope'; it is the number of rows that the table"),
    ({'width': '16'}, r"^model\.width is '16'; expected int$"),
    ({'norm': 'batch'}, r"^model\.norm is 'batch'; expected one of 'rms', 'rms_offset', 'layer', "),
    ({'dropout': Dropout(residual=1.5)}, r'^model\.dropout: dropout\.residual is 1\.5; write a probability from 0'),
    ({'layers': 0}, r'^model: layers is 0; it must be at least 1$'),
    (
        {'remat': 'query+kei'},
        r"remat 'query\+kei': unknown name 'kei' \(did you mean 'key'\?\); write none, full, dots",
    ),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG)
def test_a_config_that_cannot_be_says_why(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy.config(**changes).make()


@pytest.mark.parametrize('place', ['residual', 'attention', 'embedding'])
@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_dropout_is_a_probability_below_one(place, rate):
    with pytest.raises(ConfigError, match=rf'dropout.{place} is {rate}; write a probability from 0 to below 1'):
        Dropout(**{place: rate}).validate()


def test_tokens_that_are_not_in_rows_are_one_line():
    """Without the tests' own checker of shapes, which would be first."""
    model = toy.graph(CONFIG).bind(WEIGHTS)
    with pytest.raises(ValueError, match=r'tokens of shape \[8\]: give rows, \[batch, length\]'):
        inspect.unwrap(Decoder.__call__)(model, jnp.arange(8))


def test_text_is_no_tokens():
    model = toy.graph(CONFIG).bind(WEIGHTS)
    with pytest.raises(
        ValueError, match=r"tokens is a str, not an array Int\['B T'\] of ids: .*encode.* tpu_llm.generate"
    ):
        inspect.unwrap(Decoder.__call__)(model, 'hello')

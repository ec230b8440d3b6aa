"""Rows split over `seq`: every way equals one device, does the work it must and no more, and says what cannot hold.

Tolerance: 1e-5 on numbers of order 1, in float32; 1e-6 of a model's loss and 1e-5 of a gradient's largest entry.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.evals.perplexity import Evaluator
from tpu_llm.kernels import blockwise, reference, ring
from tpu_llm.kernels.attention import Dropped, attention
from tpu_llm.kernels.blockwise import Options
from tpu_llm.kernels.mask import Mask
from tpu_llm.models.decoder_config import Dropout
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.position import from_segments
from tpu_llm.nn.router import Router
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.parallel import sequence, sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

LENGTH = 64
PACKED = np.ones((2, LENGTH), np.int32)
PACKED[0, 10:43], PACKED[0, 43:58], PACKED[0, 58:] = 2, 3, 0

# Way, kernel; (query heads, key-value heads), soft-cap, what else the mask is, packed or not.
WAYS = [('gather', 'xla'), ('gather', 'blockwise'), ('ulysses', 'xla'), ('ulysses', 'blockwise'), ('ring', 'blockwise')]
CASES = {
    'causal': ((8, 8), 0.0, {}, False),
    'packed': ((8, 8), 0.0, {}, True),
    'window': ((8, 8), 0.0, {'window': 5}, False),
    'long window': ((8, 8), 0.0, {'window': 30}, False),
    'grouped': ((8, 2), 0.0, {}, False),
    'soft-cap': ((8, 8), 0.5, {}, False),
    'both ways': ((8, 8), 0.0, {'causal': False, 'window': 5}, True),
    'everything': ((8, 2), 0.5, {'window': 7}, True),
}
ALWAYS = {
    ('ring', 'blockwise', 'everything'),
    ('ulysses', 'xla', 'everything'),
    ('gather', 'blockwise', 'everything'),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_mask(segments, **kind):
    segments = jnp.asarray(segments)
    positions = from_segments(segments)
    return Mask(
        query_segments=segments, query_positions=positions, key_segments=segments, key_positions=positions, **kind
    )


def with_gradients(attend, inputs):
    """What comes out, and the gradients of a weighted sum of it."""
    direction = normal(3, *inputs[0].shape)

    def weighted(*inputs):
        out = attend(*inputs)
        return (out * direction).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


@pytest.mark.parametrize(
    ('way', 'impl', 'case'),
    [
        pytest.param(*way, case, marks=() if (*way, case) in ALWAYS else pytest.mark.full)
        for way in WAYS
        for case in CASES
    ],
)
def test_attention_over_split_rows_equals_the_reference(way, impl, case):
    (heads, kv_heads), softcap, kind, packed = CASES[case]
    mask = make_mask(PACKED if packed else np.ones_like(PACKED), **kind)
    inputs = normal(0, 2, LENGTH, heads, 4), normal(1, 2, LENGTH, kv_heads, 4), normal(2, 2, LENGTH, kv_heads, 4)

    def split(*inputs):
        with sharding.use(toy.layout(seq=8)):
            there = jax.tree.map(sequence.zigzag, (*inputs, mask))
            return sequence.natural(attention(*there, impl=impl, sequence=way, softcap=softcap))

    expected = with_gradients(lambda *inputs: reference.attention(*inputs, mask.allowed(), 0.5, softcap), inputs)
    for actual, e in zip(with_gradients(split, inputs), expected, strict=True):
        np.testing.assert_allclose(actual, e, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize('peers', [2, 4, 8])
def test_zigzag_order_gives_each_device_an_early_and_a_late_piece(peers):
    row = np.arange(4 * peers)
    with sharding.use(toy.layout(seq=peers)):
        there = jax.jit(sequence.zigzag)(jnp.asarray(row)[None])
        back = jax.jit(sequence.natural)(there)
    np.testing.assert_array_equal(there[0], row.reshape(2 * peers, 2)[sequence.pieces(peers)].reshape(-1))
    np.testing.assert_array_equal(back[0], row)
    assert sequence.pieces(2) == [0, 3, 1, 2]


def test_without_a_layout_that_splits_rows_the_order_stays():
    x = normal(0, 2, 6)
    assert sequence.zigzag(x) is x
    with sharding.use(toy.layout(data=2)):
        assert sequence.zigzag(x) is x


# ---------------------------------------------------------------------------------------------- what is skipped


def rows(random, kind):
    """Packed rows, in any order and with padding anywhere, as blocks of 4 of 24 tokens."""
    segments = np.sort(random.integers(1, 4, (2, 24)), axis=1)
    segments[:, random.integers(18, 25) :] = 0
    positions = np.asarray(from_segments(jnp.asarray(segments)))
    order = random.permutation(6) if kind == 'shuffled' else np.arange(6)
    return [jnp.asarray(x.reshape(2, 6, 4)[:, order].reshape(2, 24)) for x in (segments, positions)]


@pytest.mark.parametrize('kind', ['natural', 'shuffled'])
@pytest.mark.parametrize('seen', [{}, {'window': 3}, {'causal': False, 'window': 6}, {'causal': False}])
def test_a_block_is_skipped_only_if_no_query_of_it_sees_a_key(kind, seen):
    random, skipped = np.random.default_rng(0), 0
    for _ in range(20):
        (segments, positions), keys = rows(random, kind), rows(random, kind)
        mask = Mask(
            query_segments=segments, query_positions=positions, key_segments=keys[0], key_positions=keys[1], **seen
        )
        visible = np.asarray(blockwise.visible(mask, Options(scale=1.0, block=4)))
        allowed = np.asarray(mask.allowed()).reshape(2, 6, 4, 6, 4).any(axis=(0, 2, 4))
        assert (visible | ~allowed).all()
        skipped += (~visible).sum()
    assert skipped > 20


@pytest.fixture
def visits(monkeypatch):
    """Of packed rows in zig-zag or natural order: the blocks of 4 computed by each of 4 devices, going forward."""
    peers, counts = 4, collections.Counter()
    accumulate = blockwise._accumulate

    def counting(*args):
        jax.debug.callback(lambda device: counts.update([int(device)]), jax.lax.axis_index('seq'))
        return accumulate(*args)

    monkeypatch.setattr(blockwise, '_accumulate', counting)

    @functools.cache
    def program(window):
        layout = toy.layout(seq=peers)
        spec = layout.spec('BT')

        def attend(x, segments, positions):
            mask = make_mask(segments, window=window)
            mask = dataclasses.replace(mask, query_positions=positions, key_positions=positions)
            options = Options(scale=1.0, block=4)
            return ring.attend(x, x, x, mask, ring.PARTS['blockwise'], options, peers)

        return jax.jit(sharding.manual(attend, layout, in_specs=(spec, spec, spec), out_specs=spec))

    def run(segments, *, zigzag=True, window=0):
        order = sequence.pieces(peers) if zigzag else np.arange(2 * peers)
        rows = np.asarray(segments), np.asarray(from_segments(jnp.asarray(segments)))
        there = [x.reshape(2 * peers, -1)[order].reshape(1, LENGTH) for x in rows]
        counts.clear()
        jax.block_until_ready(program(window)(normal(0, 1, LENGTH, 1, 2), *there))
        jax.effects_barrier()
        return [counts[device] for device in range(peers)]

    return run


def test_devices_share_the_work_and_do_no_more_than_they_must(visits):
    one, four = np.ones((1, LENGTH), np.int32), np.repeat([[1, 2, 3, 4]], LENGTH // 4, axis=1)
    # 16 blocks of queries and of keys: on the diagonal and below it are 16 * 17 / 2 of 256.
    assert visits(one) == [34] * 4
    assert visits(one, zigzag=False) == [10, 26, 42, 58]
    # Of four documents, each sees its own four blocks; in a window, each block itself and the one before it.
    assert sum(visits(four)) == 4 * 10
    assert sum(visits(one, window=5)) == 16 + 15


def test_keys_go_all_the_way_round_or_as_far_as_a_window_reaches():
    def ways(window, peers):
        return ring.ways(make_mask(np.ones((1, 8), np.int32), window=window), peers)  # two pieces of 4 a device

    assert ways(0, 8) == ((1, 7),)
    assert ways(0, 1) == ((1, 0),)
    assert ways(1, 8) == ways(5, 8) == ((1, 1), (-1, 1))
    assert ways(6, 8) == ((1, 2), (-1, 2))
    assert ways(13, 8) == ((1, 3), (-1, 3))
    assert ways(14, 8) == ((1, 7),)  # four hops either way would be more than seven one way


def test_no_array_of_queries_by_keys_exists_even_where_layers_share_a_mask():
    length, layers = 512, 2
    mask = make_mask(np.ones((1, length), np.int32))

    def run(x):
        def layer(x, _):
            return x + attention(x, x, x, mask, impl='blockwise'), None

        return jax.lax.scan(layer, x, None, length=layers)[0].sum()

    text = jax.jit(jax.grad(run)).lower(normal(0, 1, length, 1, 4)).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(',')]) for dims in re.findall(r'(?:f32|pred)\[([\d,]+)\]', text)]
    assert max(sizes) == (length // 2) ** 2


def test_saving_what_was_attended_spares_the_second_forward_pass():
    mask = make_mask(np.ones((1, 8), np.int32))

    def passes(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(functools.partial(attention, impl='blockwise'), policy=policy)
        gradient = jax.make_jaxpr(jax.grad(lambda x: attend(x, x, x, mask).sum()))
        return str(gradient(normal(0, 1, 8, 1, 2))).count('= log ')

    assert passes('attended') < passes('query')


# ------------------------------------------------------------------------------------------------- whole models

MODELS = {
    'dense': {},
    'windows': {'windows': (0, 5), 'attention_softcap': 2.0},
    'moe': {'moe': MoE(experts=4, chosen=2, expert_width=8, router=Router(balance_over='row', z_loss=1e-2))},
}
BATCH = toy.batch(np.array([[1] * 5 + [2] * 8 + [0] * 3, [1] * 16] * 2))
LAYOUTS = [
    ('dense', 'ring', {'seq': 2, 'fsdp': 2, 'tensor': 2}, True),
    ('moe', 'ring', {'seq': 2, 'expert': 2}, False),
    ('dense', 'ulysses', {'seq': 2, 'fsdp': 2, 'tensor': 2}, False),
    ('windows', 'ring', {'seq': 8}, False),
    ('moe', 'ring', {'seq': 4, 'data': 2}, False),
    ('windows', 'ring', {'stage': 2, 'seq': 4}, False),
    ('dense', 'ulysses', {'stage': 2, 'seq': 4}, False),
    ('windows', 'ulysses', {'seq': 4, 'data': 2}, False),
    ('moe', 'ulysses', {'seq': 2, 'expert': 2}, False),
    ('moe', 'gather', {'seq': 2, 'expert': 2}, False),
    ('dense', 'gather', {'seq': 2, 'fsdp': 2, 'tensor': 2}, False),
]


def loss_and_gradients(model, layout, **changes):
    """Of the sum of the losses, the weights drawn from the same noise on every layout."""
    config = toy.config(**(MODELS[model] | {'layers': 4, 'heads': 8, 'kv_heads': 4} | changes))
    graph = toy.graph(config, stages=layout.mesh.shape['stage'])
    dims = {name: leaf.get_metadata('dims') for name, leaf in graph.leaves.items()}
    weights = {
        name: jax.device_put(w, layout.named(layout.rules.params, dims[name], w.shape, name))
        for name, w in toy.weights(graph).items()
    }
    batch = jax.device_put(BATCH, layout.named(layout.rules.activations, 'BT', BATCH.tokens.shape))

    def loss(weights, batch):
        with sharding.use(layout):
            return NextToken()(graph.bind(weights), batch, frozen=None, key=None, step=jnp.int32(0))[0]

    return jax.jit(jax.value_and_grad(loss))(weights, batch)


@pytest.fixture(scope='module')
def alone():
    return functools.cache(lambda model: loss_and_gradients(model, toy.layout()))


@pytest.mark.parametrize(
    ('model', 'way', 'axes'),
    [pytest.param(*case, marks=() if always else pytest.mark.full) for *case, always in LAYOUTS],
)
def test_a_model_over_split_rows_equals_one_device(alone, model, way, axes):
    attention = 'xla' if way == 'ulysses' else 'blockwise'
    loss, gradients = loss_and_gradients(model, toy.layout(**axes), sequence=way, attention=attention)
    expected_loss, expected = alone(model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, e in expected.items():
        np.testing.assert_allclose(gradients[name], e, atol=1e-5 * np.abs(e).max(), err_msg=name)


def test_evaluation_of_split_rows_equals_one_device():
    config = {'attention': 'blockwise', 'sequence': 'ring'}

    class Nothing:
        """The evaluator scores batches that are given, so no text is read."""

    def score(layout):
        graph = toy.graph(toy.config(**config))
        evaluator = Evaluator(graph, Nothing(), layout, rows=4, seq_len=16)
        weights = {name: jax.device_put(w, layout.replicated) for name, w in toy.weights(graph).items()}
        return evaluator.score(weights, [BATCH], raw_bytes=1).nats

    np.testing.assert_allclose(score(toy.layout(seq=4)), score(toy.layout()), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- what cannot hold


def check(length=64, mesh=None, **changes):
    fields = {'heads': 12, 'kv_heads': 6} | changes
    toy.config(**fields).check_split(length, {'seq': 4, 'tensor': 1} | (mesh or {}))


RING = {'sequence': 'ring', 'attention': 'blockwise'}
REFUSED = {
    'rows': (
        {'length': 66},
        r'rows of 66 tokens do not divide into seq = 4 pieces; the nearest that work are rows of 64 or 68 tokens, or '
        r'seq = 3 or 6$',
    ),
    'zig-zag rows': (
        {'length': 68} | RING,
        r'rows of 68 tokens do not divide into 2 x seq = 8 pieces \(two a device, in zig-zag order\); the nearest that '
        r'work are rows of 64 or 72 tokens, or seq = 2 or 17$',
    ),
    'short rows': ({'length': 3}, r'are rows of 4 tokens, or seq = 3$'),
    'heads': (
        {'sequence': 'ulysses', 'mesh': {'seq': 4, 'tensor': 2}},
        "sequence = 'ulysses' gives every device whole heads, but heads = 12 is not divisible by seq x tensor = 4 x 2; "
        'with tensor = 2, seq may be 1, 2, 3, 6$',
    ),
    'dropout': (
        {'dropout': Dropout(residual=0.1)} | RING,
        r"dropout.residual would not be what it is on one device: sequence = 'ring' over seq = 4 puts rows in zig-zag "
        r"order; leave it out, or set sequence = 'ulysses'$",
    ),
    'experts': (
        {'moe': MoE(experts=4, chosen=2, expert_width=8, capacity=1.0, router=Router(jitter=0.1))} | RING,
        r'moe.router.jitter and moe.capacity would not be what',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_a_mesh_cannot_split_is_an_error_that_says_what_it_can(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check(**changes)


def test_what_it_can_split_is_not():
    check()
    check(**RING)
    check(length=66, mesh={'seq': 1})
    check(sequence='ulysses', mesh={'tensor': 3})
    check(dropout=Dropout(residual=0.1, attention=0.1))
    check(dropout=Dropout(embedding=0.1), **RING)  # natural order outside the layers
    check(dropout=Dropout(residual=0.1), sequence='ulysses')


def test_a_way_that_is_none_or_that_the_attention_cannot_go_is_an_error():
    with pytest.raises(ConfigError, match="sequence = 'circle'; there are gather, ulysses, ring"):
        toy.config(sequence='circle').make()
    with pytest.raises(ConfigError, match="attention = 'reference' cannot; set attention to 'auto' or 'blockwise'"):
        toy.config(sequence='ring', attention='reference').make()


def test_weights_that_would_be_dropped_elsewhere_are_an_error():
    x, mask = normal(0, 1, 16, 4, 2), make_mask(np.ones((1, 16), np.int32))
    dropped = Dropped(0.1, jax.random.split(jax.random.key(0), 1))
    message = (
        r"dropout.attention = 0.1 with sequence = 'ulysses' over seq = 4 would not drop .* set it to 0, or sequence"
    )
    with sharding.use(toy.layout(seq=4)), pytest.raises(ConfigError, match=message):
        attention(x, x, x, mask, impl='xla', sequence='ulysses', dropped=dropped)


def test_what_is_not_checked_before_is_checked_while_tracing():
    x, mask = normal(0, 1, 16, 4, 2), make_mask(np.ones((1, 16), np.int32))
    with sharding.use(toy.layout(seq=8)):
        with pytest.raises(ConfigError, match='heads = 4 is not divisible by seq x tensor = 8 x 1'):
            attention(x, x, x, mask, impl='xla', sequence='ulysses')
        with pytest.raises(ConfigError, match='rows of 24 tokens do not divide into 2 x seq = 16 pieces'):
            sequence.zigzag(normal(0, 1, 24))

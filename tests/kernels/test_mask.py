"""What scores gain by distance: ALiBi's slopes and T5's buckets, and attention with them.

Tolerance: 1e-5 on numbers of order 1, in float32.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.kernels.attention import Mask, attention
from tpu_llm.kernels.mask import BUCKETS, alibi_slopes, bucket
from tpu_llm.parallel import sharding

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
# Far enough apart for every bucket.
POSITIONS = 40 * jnp.array([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_mask(times=1, **kind):
    """With `relative`, that table in every row."""
    if 'relative' in kind:
        kind['relative'] = jnp.broadcast_to(kind['relative'][None], (2, *kind['relative'].shape))
    positions = POSITIONS // times
    rows = {'query_segments': SEGMENTS, 'query_positions': positions}
    return Mask(**rows, key_segments=SEGMENTS, key_positions=positions, **kind)


# Six heads share three keys.
BIASED = [
    {'slopes': alibi_slopes(6)},
    {'relative': normal(5, BUCKETS, 6), 'window': 100},
    {'slopes': alibi_slopes(6), 'causal': False},
    {'relative': normal(5, BUCKETS, 6), 'causal': False},
]


@pytest.mark.parametrize('kind', BIASED, ids=['alibi', 'relative', 'alibi, both ways', 'relative, both ways'])
def test_scores_that_depend_on_the_distance_equal_those_of_numpy(kind):
    query, key, value = (normal(i, 2, 9, n, 4) for i, n in enumerate((6, 3, 3)))
    mask = make_mask(**kind)
    outs = [
        np.asarray(attention(query, key, value, mask, impl=impl, softcap=0.5)) for impl in ('auto', 'xla', 'reference')
    ]
    allowed = np.asarray(mask.allowed())
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, t, n in np.ndindex(2, 9, 6):
        scores = key[b, :, n // 2] @ query[b, t, n] / 2
        distances = [int(mask.query_positions[b, t] - p) for p in mask.key_positions[b]]
        scores = 0.5 * np.tanh(scores / 0.5) + [gain(mask, n, distance) for distance in distances]
        odds = np.exp(scores) * allowed[b, t]
        for out in outs:
            np.testing.assert_allclose(out[b, t, n], odds / odds.sum() @ value[b, :, n // 2], atol=1e-5)


def gain(mask, head, distance):
    if mask.slopes:
        return -mask.slopes[head] * abs(distance)
    return float(mask.relative[0, bucket(distance, mask.causal), head])


def test_the_table_of_relative_positions_learns():
    """Its gradient is that of the reference, and of finite differences."""
    query, key, value, direction = (normal(i, 2, 9, n, 4) for i, n in enumerate((4, 2, 2, 4)))
    table = normal(5, BUCKETS, 4)

    @functools.partial(jax.jit, static_argnames='impl')
    def both(table, impl):
        def loss(table):
            return (attention(query, key, value, make_mask(40, relative=table), impl=impl) * direction).sum()

        return jax.value_and_grad(loss)(table)

    gradient = both(table, 'xla')[1]
    np.testing.assert_allclose(gradient, both(table, 'reference')[1], atol=1e-5)
    step = 0.01 * normal(6, BUCKETS, 4)
    difference = both(table + step, 'xla')[0] - both(table - step, 'xla')[0]
    np.testing.assert_allclose(difference, 2 * (gradient * step).sum(), rtol=1e-2)
    reached = {bucket(distance, causal=True) for distance in range(9)}
    assert set(np.flatnonzero(np.asarray(gradient).any(axis=1))) == reached


def test_buckets_of_distances_are_those_of_transformers():
    """Stored with the script that made them."""
    stored = json.loads((Path(__file__).parents[1] / 'golden/positions/buckets.json').read_text())
    for name, causal in (('causal', True), ('both ways', False)):
        assert [bucket(distance, causal) for distance in stored['distances']] == stored[name]


SLOPES = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    8: [2**-i for i in range(1, 9)],
    # Those of 8 heads, then every second one of 16.
    12: [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    3: [2**-4, 2**-8, 2**-2],
}


@pytest.mark.parametrize('heads', SLOPES)
def test_slopes_are_geometric_whatever_the_number_of_heads(heads):
    assert alibi_slopes(heads) == pytest.approx(SLOPES[heads], rel=1e-12)
    assert len(alibi_slopes(71)) == len(set(alibi_slopes(71))) == 71


def test_slopes_end_where_they_are_told():
    """MPT's code with alibi_bias_max = 16; Falcon-RW divides its own by the root of a head's width."""
    assert alibi_slopes(4, 16.0) == pytest.approx([2**-4, 2**-8, 2**-12, 2**-16], rel=1e-12)
    assert alibi_slopes(3, 16.0, 0.125) == pytest.approx([2**-11, 2**-19, 2**-7], rel=1e-12)


def test_ways_of_split_rows_that_add_nothing_to_scores_say_so():
    query, key, value = (normal(i, 2, 8, 6, 4) for i in range(3))
    mask = jax.tree.map(lambda x: x[:, :8], make_mask(slopes=alibi_slopes(6)))
    with sharding.use(toy.layout(seq=2)):
        for sequence in ('ulysses', 'ring'):
            message = (
                f"sequence = '{sequence}' adds nothing to scores, but position = 'alibi' asks for it; set sequence"
            )
            with pytest.raises(ConfigError, match=message):
                attention(query, key, value, mask, sequence=sequence)


@pytest.mark.parametrize('kind', BIASED[:2], ids=['alibi', 'relative'])
@pytest.mark.parametrize('impl', ['blockwise', 'splash'])
def test_what_adds_nothing_to_scores_says_so(impl, kind):
    mask = make_mask(**kind)
    message = f"attention = '{impl}' adds nothing to scores, but position = '{mask.biased}' asks for it; set attention"
    with pytest.raises(ConfigError, match=message):
        attention(*(normal(i, 2, 9, 6, 4) for i in range(3)), mask, impl=impl)


# ------------------------------------------------------------------------------------------------- prefixes

PREFIX = jnp.array([[1, 1, 0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]], bool)


def test_a_prefix_is_seen_by_all_of_its_segment():
    mask = make_mask(40, prefix=PREFIX, window=3)
    allowed = np.asarray(mask.allowed())
    for b, t, s in np.ndindex(2, 9, 9):
        distance = int(mask.query_positions[b, t] - mask.key_positions[b, s])
        same = SEGMENTS[b, t] == SEGMENTS[b, s]
        assert allowed[b, t, s] == (same and (distance >= 0 or bool(PREFIX[b, s])) and abs(distance) < 3)
    query, key, value = (normal(i, 2, 9, n, 4) for i, n in enumerate((6, 3, 3)))
    outs = [attention(query, key, value, mask, impl=impl) for impl in ('auto', 'xla', 'reference')]
    for out in outs:
        np.testing.assert_allclose(out, outs[-1], atol=1e-5)


def test_attention_that_cannot_see_a_prefix_says_so():
    mask = make_mask(prefix=PREFIX)
    inputs = [normal(i, 2, 9, 6, 4) for i in range(3)]
    for impl in ('blockwise', 'splash'):
        message = f"attention = '{impl}' cannot let a prefix see all of itself; set attention to 'auto'"
        with pytest.raises(ConfigError, match=message):
            attention(*inputs, mask, impl=impl)
    halves = jax.tree.map(lambda x: x[:, :8], mask)
    with sharding.use(toy.layout(seq=2)):
        for sequence in ('ulysses', 'ring'):
            message = f"sequence = '{sequence}' cannot let a prefix see all of itself; set sequence to 'gather'"
            with pytest.raises(ConfigError, match=message):
                attention(*(x[:, :8] for x in inputs), halves, sequence=sequence)

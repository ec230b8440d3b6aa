"""Ring attention over the TPU kernel, interpreted: rows in zig-zag order equal the reference, forward and backward.

Tolerance: 1e-5 on numbers of order 1, in float32.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.kernels import reference, splash, splash_part
from tpu_llm.kernels.attention import attention
from tpu_llm.kernels.blockwise import UNSEEN, Options
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel import sequence, sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

PIECE = 128  # tokens, the kernel's smallest block
PACKED = [1] * 100 + [2] * 250 + [3] * 62 + [0] * 100  # of 512 tokens; longer rows go on as padding

# (devices, query heads, key-value heads, soft-cap, what else the mask is, packed or not)
CASES = {
    'everything': (2, 4, 2, 0.5, {'window': 90}, True),
    'causal': (2, 2, 2, 0.0, {}, False),
    'packed': (2, 2, 2, 0.0, {}, True),
    'soft-cap': (2, 2, 2, 0.5, {}, False),
    'grouped': (4, 4, 1, 0.0, {}, True),
    'long window': (4, 2, 1, 0.0, {'window': 300}, False),
    'window, a few hops either way': (8, 2, 1, 0.0, {'window': 200}, True),
    'both ways': (2, 2, 1, 0.0, {'causal': False}, True),
    'both ways in a window': (4, 2, 1, 0.0, {'causal': False, 'window': 150}, False),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_mask(length, packed=False, **kind):
    rows = np.ones((2, length), np.int32)
    if packed:
        rows[0] = (PACKED + [0] * length)[:length]
    segments = jnp.asarray(rows)
    positions = from_segments(segments)
    return Mask(
        query_segments=segments, query_positions=positions, key_segments=segments, key_positions=positions, **kind
    )


def with_gradients(attend, inputs):
    direction = normal(3, *inputs[0].shape[:-1], inputs[2].shape[-1])

    def weighted(*inputs):
        out = attend(*inputs)
        return (out * direction).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=() if case == 'everything' else pytest.mark.full) for case in CASES]
)
def test_a_ring_over_the_kernel_equals_the_reference(case):
    peers, heads, kv_heads, softcap, kind, packed = CASES[case]
    length = 2 * peers * PIECE
    mask = make_mask(length, packed, **kind)
    shapes = (heads, 4), (kv_heads, 4), (kv_heads, 3)  # values narrower than keys
    inputs = [normal(i, 2, length, *shape) for i, shape in enumerate(shapes)]

    def split(*inputs):
        with sharding.use(toy.layout(seq=peers)):
            there = jax.tree.map(sequence.zigzag, (*inputs, mask))
            return sequence.natural(attention(*there, impl='splash', sequence='ring', softcap=softcap))

    expected = with_gradients(lambda *inputs: reference.attention(*inputs, mask.allowed(), 0.5, softcap), inputs)
    for actual, e in zip(with_gradients(split, inputs), expected, strict=True):
        np.testing.assert_allclose(actual, e, atol=1e-5)


@pytest.mark.full
def test_visits_of_bfloat16_merge_in_float32():
    length, peers = 2048, 8
    inputs = [normal(i, 2, length, 2, 8).astype(jnp.bfloat16) for i in range(3)]
    mask = make_mask(length)

    def split(*inputs):
        with sharding.use(toy.layout(seq=peers)):
            there = jax.tree.map(sequence.zigzag, (*inputs, mask))
            return sequence.natural(attention(*there, impl='splash', sequence='ring'))

    actual = with_gradients(split, inputs)
    expected = with_gradients(
        lambda *inputs: attention(*inputs, mask, impl='xla'), [x.astype('float32') for x in inputs]
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max())


# ------------------------------------------------------------------------------------ what is seen, and what is not


def pair(queries, keys, piece, **kind):
    """The mask of one device's tokens, whose two pieces are named by their places among a row's, and another's."""
    places = [jnp.concatenate([p * piece + jnp.arange(piece) for p in pieces])[None] for pieces in (queries, keys)]
    ones = jnp.ones_like(places[0])
    return Mask(query_segments=ones, query_positions=places[0], key_segments=ones, key_positions=places[1], **kind)


@pytest.mark.parametrize('kind', [{}, {'window': 6}, {'window': 1}, {'causal': False, 'window': 9}])
@pytest.mark.parametrize('keys', [(0, 7), (1, 6), (2, 5), (3, 4)])
def test_the_keys_that_a_query_sees_lie_side_by_side(keys, kind):
    mask = pair((2, 5), keys, 4, **kind)
    numbers, indices = splash_part._numbers(mask), jnp.arange(8)
    sees = splash_part._between if mask.window else splash_part._up_to
    np.testing.assert_array_equal(sees(numbers[:, None], indices[None]), mask.allowed()[0])


def test_numbers_hold_as_many_keys_as_are_allowed():
    piece = splash.KEYS // 2 - splash.LANES
    mask = pair((1, 2), (1, 2), piece, window=3)
    numbers, last = splash_part._numbers(mask), 2 * piece - 1
    seen = [bool(splash_part._between(numbers[last], jnp.int32(key))) for key in range(last - 4, last + 1)]
    assert seen == [False, False, True, True, True]


@pytest.mark.parametrize('keys', [(0, 7), (3, 4), (2, 5)])
def test_a_block_that_is_skipped_fetches_only_what_the_next_one_needs(keys):
    mask = pair((2, 5), keys, 8, window=11)
    for stay in (True, False):
        table = splash_part._tables(mask, Options(scale=1.0, block=4), queries_stay=stay)
        seen, fetched = (np.asarray(x[0] if stay else x[0].T) for x in (table.block_mask, table.data_next))
        assert 0 < seen.sum() < seen.size
        columns = np.broadcast_to(np.arange(4), (4, 4))
        np.testing.assert_array_equal(fetched[seen > 0], columns[seen > 0])
        fetches = 1 + (np.diff(fetched.reshape(-1)) != 0).sum()
        assert fetches <= seen.sum()


def test_what_is_not_seen_counts_nothing():
    """A piece of keys that comes after all queries: the kernel is not called for it, and says so if it is."""
    mask = pair((0, 1), (2, 3), PIECE)
    q, k, v = (normal(i, 1, 1, 2 * PIECE, 4) for i in range(3))
    _, log_sum = splash_part.forward(q, k, v, mask, Options(scale=1.0, block=PIECE))
    assert (np.asarray(log_sum) == UNSEEN).all()


REFUSED = [
    (64, {}, 'needs pieces of a multiple of 128 tokens, two a device, and these have 64'),
    (splash.KEYS // 2, {'window': 9}, 'finds a window in less than 65536 tokens a device, and here are 65536'),
    (128 * 1031, {}, 'cuts a row into at most 256 blocks, and one of 263936 tokens would be 2062 of 128'),
]


@pytest.mark.parametrize(('piece', 'kind', 'message'), REFUSED)
def test_what_a_ring_over_the_kernel_cannot_hold_is_an_error_that_says_why(piece, kind, message):
    length = 4 * piece
    x, row = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = Mask(query_segments=row, query_positions=row, key_segments=row, key_positions=row, **kind)

    def trace(impl):
        return jax.eval_shape(lambda *inputs: attention(*inputs, impl=impl, sequence='ring'), x, x, x, mask)

    with sharding.use(toy.layout(seq=2)):
        with pytest.raises(ConfigError, match=re.escape(f"attention = 'splash' {message}; set attention to 'auto'")):
            trace('splash')
        assert trace('auto').shape == x.shape


# Tokens a device, window, and the blocks: as large as may be, unless a window would hide most of them.
BLOCKS = [(256, 0, 128), (2048, 0, 1024), (4096, 1024, 512), (8192, 0, 1024), (2304, 0, 384)]


@pytest.mark.parametrize(('length', 'window', 'block'), BLOCKS)
def test_a_ring_works_in_blocks_that_divide_a_piece(length, window, block):
    assert splash.block_size(jnp.zeros((1, length, 1, 1)), window, ring=True) == block

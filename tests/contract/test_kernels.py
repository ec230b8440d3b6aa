"""Every kernel equals its plain reference, forward and backward. A new attention is covered by its entry in IMPLS.

Tolerance: 1e-5 on numbers of order 1, in float32.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.kernels import reference
from tpu_llm.kernels.attention import IMPLS, Dropped, Mask, attention
from tpu_llm.kernels.cross_entropy import Options, cross_entropy

pytestmark = pytest.mark.usefixtures('quick_compile')

PACKED = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])

# (query heads, key-value heads), the scores' soft-cap, and what the mask is besides segments and positions.
ATTENTION = {
    'each its own': ((4, 4), 0.0, {}),
    'grouped': ((4, 2), 0.0, {}),
    'multi-query': ((4, 1), 0.0, {}),
    'window': ((4, 2), 0.0, {'window': 2}),
    'soft-cap': ((4, 2), 0.5, {}),
    'both ways': ((4, 2), 0.0, {'causal': False}),
    'everything': ((6, 3), 0.5, {'causal': False, 'window': 2}),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_mask(**kind):
    return Mask(query_segments=PACKED, query_positions=POSITIONS, key_segments=PACKED, key_positions=POSITIONS, **kind)


@pytest.mark.parametrize('impl', [impl for impl in IMPLS if impl != 'reference'])
@pytest.mark.parametrize('case', ATTENTION)
def test_attention_equals_the_reference(impl, case):
    (heads, kv_heads), softcap, kind = ATTENTION[case]
    mask = make_mask(**kind)
    inputs = normal(0, 2, 9, heads, 4), normal(1, 2, 9, kv_heads, 4), normal(2, 2, 9, kv_heads, 4)
    direction = normal(3, 2, 9, heads, 4)

    def run(attend):
        def weighted(*inputs):
            out = attend(*inputs)
            return (out * direction).sum(), out

        gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
        (_, out), gradients = gradient(*inputs)
        return out, *gradients

    actual = run(lambda *inputs: attention(*inputs, mask, impl=impl, softcap=softcap))
    expected = run(lambda *inputs: reference.attention(*inputs, mask.allowed(), 4**-0.5, softcap))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize('kind', [{}, {'window': 2}, {'causal': False}, {'causal': False, 'window': 3}])
def test_a_mask_says_of_each_pair_whether_the_query_sees_the_key(kind):
    allowed = np.asarray(make_mask(**kind).allowed())
    for b, t, s in np.ndindex(allowed.shape):
        distance = int(POSITIONS[b, t] - POSITIONS[b, s])
        window = kind.get('window', 0)
        sees = PACKED[b, t] == PACKED[b, s]
        sees &= distance >= 0 or not kind.get('causal', True)
        sees &= not window or abs(distance) < window
        assert allowed[b, t, s] == sees


def test_bfloat16_attention_has_a_float32_softmax():
    query, key, value = (normal(i, 2, 9, 2, 4) for i in range(3))
    coarse = attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), make_mask())
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_allclose(coarse, attention(query, key, value, make_mask()), atol=0.05)


def test_dropped_attention_weights_leave_the_mean_as_it_was():
    query, key, value = (normal(i, 1, 9, 2, 4) for i in range(3))
    mask = jax.tree.map(lambda x: x[1:], make_mask())
    whole = attention(query, key, value, mask)
    keys = jax.random.split(jax.random.key(0), 4000)
    dropped = jax.jit(jax.vmap(lambda k: attention(query, key, value, mask, dropped=Dropped(0.25, k))))(keys)
    assert np.abs(dropped[0] - whole).max() > 0.1
    np.testing.assert_allclose(dropped.mean(axis=0), whole, atol=0.05)


# ------------------------------------------------------------------------------------------ cross-entropy

# 10 real tokens in a padded vocabulary of 16 (or of 10), rows of 6.
CROSS_ENTROPY = {
    'plain': Options(vocab_size=16),
    'padded': Options(vocab_size=10),
    'whole rows': Options(vocab_size=10, chunk=6),
    'one by one': Options(vocab_size=10, chunk=1),
    'soft-cap': Options(vocab_size=10, softcap=1.5),
    'z-loss': Options(vocab_size=10, z_loss=0.3),
    'smoothing': Options(vocab_size=10, label_smoothing=0.2),
    'smoothing, no padding': Options(vocab_size=16, label_smoothing=0.2),
    'everything': Options(vocab_size=10, softcap=1.5, z_loss=0.3, label_smoothing=0.2, chunk=2),
}

HIDDEN, KERNEL = normal(0, 3, 6, 5), normal(1, 5, 16)
TARGETS = jnp.asarray(np.random.default_rng(2).integers(0, 10, (3, 6)))
WEIGHTS = jnp.array([[1, 1, 0, 1, 0, 0], [0.5, 2, 1, 1, 1, 1], [0] * 6], jnp.float32)


def chunked(hidden, kernel, options, dtype=jnp.float32):
    return cross_entropy(hidden, kernel, TARGETS, WEIGHTS, options, jnp.dtype(dtype))


def plain(hidden, kernel, options):
    fields = {name: getattr(options, name) for name in ('vocab_size', 'softcap', 'z_loss', 'label_smoothing')}
    nll = fields | {'z_loss': 0.0, 'label_smoothing': 0.0}
    loss, nll = (reference.cross_entropy(hidden, kernel, TARGETS, **f) for f in (fields, nll))
    return (loss * WEIGHTS).sum(), (nll * WEIGHTS).sum()


@pytest.mark.parametrize('case', CROSS_ENTROPY)
def test_cross_entropy_equals_the_reference(case):
    options = dataclasses.replace(CROSS_ENTROPY[case], chunk=CROSS_ENTROPY[case].chunk or 3)

    def run(f):
        gradient = jax.value_and_grad(lambda h, k: f(h, k, options), argnums=(0, 1), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(HIDDEN, KERNEL))

    actual = run(chunked)
    for a, e in zip(actual, run(plain), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    # Without a gradient to compute, another program runs.
    np.testing.assert_allclose(jax.jit(lambda h, k: chunked(h, k, options))(HIDDEN, KERNEL), actual[:2], rtol=1e-6)


def test_the_gradient_scales_with_what_is_made_of_the_loss():
    options = CROSS_ENTROPY['padded']
    once = jax.grad(lambda h: chunked(h, KERNEL, options)[0])(HIDDEN)
    thrice = jax.grad(lambda h: 3 * chunked(h, KERNEL, options)[0] + 7 * chunked(h, KERNEL, options)[1])(HIDDEN)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)  # nll is a metric: it has no gradient


def test_bfloat16_cross_entropy_sums_in_float32():
    fine = jax.value_and_grad(lambda h: chunked(h, KERNEL, CROSS_ENTROPY['padded'])[0])(HIDDEN)
    coarse = jax.value_and_grad(lambda h: chunked(h, KERNEL, CROSS_ENTROPY['padded'], 'bfloat16')[0])(HIDDEN)
    assert coarse[0].dtype == coarse[1].dtype == jnp.float32
    np.testing.assert_allclose(coarse[0], fine[0], rtol=1e-2)
    np.testing.assert_allclose(coarse[1], fine[1], atol=3e-2)


def test_a_chunk_that_does_not_divide_the_row_is_an_error():
    with pytest.raises(ValueError, match='loss chunk 4 does not divide the 6 positions of a row'):
        chunked(HIDDEN, KERNEL, Options(vocab_size=10, chunk=4))


def largest(program: str) -> int:
    """Entries of the largest float32 array of a compiled program."""
    return max(math.prod(map(int, dims.split(','))) for dims in re.findall(r'f32\[([\d,]+)\]', program))


def test_whole_logits_exist_nowhere_in_the_program():
    rows, length, vocab = 4, 64, 96
    hidden, kernel = normal(0, rows, length, 5), normal(1, 5, vocab)
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def chunked(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, weights, Options(vocab_size=vocab, chunk=8), jnp.dtype('float32'))

    def whole(hidden, kernel):
        fields = {'vocab_size': vocab, 'softcap': 0.0, 'z_loss': 0.0, 'label_smoothing': 0.0}
        return (reference.cross_entropy(hidden, kernel, targets, **fields) * weights).sum(), None

    sizes = {}
    for f in (chunked, whole):
        gradient = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
        sizes[f] = largest(gradient.lower(hidden, kernel).compile().as_text())
    assert sizes[whole] == rows * length * vocab
    assert sizes[chunked] == rows * 8 * vocab


def test_the_chunk_chosen_by_memory_divides_the_row_and_fits_the_budget():
    shape = (8, 1536, 4), (4, 50_000)
    text = jax.jit(
        lambda h, k: cross_entropy(
            h, k, jnp.zeros((8, 1536), jnp.int32), jnp.ones((8, 1536)), Options(vocab_size=50_000), jnp.dtype('float32')
        )
    ).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shape))
    assert 'tensor<8x8x50000xf32>' in text.as_text()  # 3.2 million of at most 2^22; 16 would be too many
    assert 'tensor<8x16x50000xf32>' not in text.as_text()

"""Every kernel equals its plain reference, forward and backward. A new attention is covered by its entry in IMPLS.

Tolerance: 1e-5 on numbers of order 1, in float32.
"""

import dataclasses
import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.kernels import grouped_matmul as grouped
from tpu_llm.kernels import megablox, reference, splash
from tpu_llm.kernels.attention import IMPLS, Dropped, Mask, attention
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.kernels.token_log_probs import token_log_probs
from tpu_llm.kernels.token_losses import token_losses

pytestmark = pytest.mark.usefixtures('quick_compile')

PACKED = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])
TIMES = {'splash': 128}  # the smallest block of a kernel: rows and windows are so many times as long

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


def rows(impls, cases, **quick):
    """Every implementation with every case; of one that is interpreted, some cases only in the longer checks."""
    return [
        pytest.param(impl, case, marks=() if case in quick.get(impl, cases) else pytest.mark.full)
        for impl in impls
        if impl != 'reference'
        for case in cases
    ]


def make_mask(times=1, *, window=0, **kind):
    segments = jnp.repeat(PACKED, times, axis=1)
    positions = jnp.repeat(POSITIONS, times, axis=1) * times + jnp.tile(jnp.arange(times), (2, 9))
    rows = {'query_segments': segments, 'query_positions': positions}
    return Mask(**rows, key_segments=segments, key_positions=positions, window=window * times, **kind)


@pytest.mark.parametrize(('impl', 'case'), rows(('auto', *IMPLS), ATTENTION, splash=('grouped', 'everything')))
def test_attention_equals_the_reference(impl, case, monkeypatch):
    monkeypatch.setattr(splash, 'BLOCK', splash.LANES)
    (heads, kv_heads), softcap, kind = ATTENTION[case]
    mask = make_mask(TIMES.get(impl, 1), **kind)
    length = mask.query_segments.shape[1]
    inputs = [normal(i, 2, length, n, 4) for i, n in enumerate((heads, kv_heads, kv_heads))]
    direction = normal(3, 2, length, heads, 4)

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


SPLASH = [
    ((1, 64), 'joins a row to itself, and not 1 queries to the 64 keys of a cache'),
    ((200, 200), 'needs rows of a multiple of 128 tokens, and these have 200'),
    ((128 * 1031,) * 2, 'cuts a row into at most 256 blocks, and one of 131968 tokens would be 1031 of 128'),
]


@pytest.mark.parametrize(('lengths', 'message'), SPLASH)
def test_what_splash_cannot_hold_is_an_error_that_says_why(lengths, message):
    queries, keys = (jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32) for length in lengths)
    row, column = (jax.ShapeDtypeStruct((1, length), jnp.int32) for length in lengths)
    mask = Mask(query_segments=row, query_positions=row, key_segments=column, key_positions=column)
    with pytest.raises(ConfigError, match=f"attention = 'splash' {message}; set attention to 'auto'"):
        jax.eval_shape(lambda *inputs: attention(*inputs, impl='splash'), queries, keys, keys, mask)
    # Where there is a choice, others hold.
    assert jax.eval_shape(attention, queries, keys, keys, mask).shape == queries.shape


# Row length, window, and the blocks: a quarter of what a query sees, from 512 to 1024, if that divides the row.
BLOCKS = [(128, 0, 128), (2048, 0, 512), (4096, 0, 1024), (65_536, 0, 1024), (65_536, 1024, 512), (1152, 0, 384)]


@pytest.mark.parametrize(('length', 'window', 'block'), BLOCKS)
def test_splash_works_in_blocks_that_suit_the_row(length, window, block):
    assert splash.block_size(jnp.zeros((1, length, 1, 1)), window) == block


def test_long_rows_have_no_whole_scores():
    """By choice: 2048 queries and keys of 2 heads, forward and backward."""
    length = 2048
    inputs = [jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)] * 3
    row = jnp.ones((1, length), jnp.int32)
    mask = Mask(query_segments=row, query_positions=row, key_segments=row, key_positions=row)
    programs = {}
    for impl in ('auto', 'xla'):
        gradient = jax.grad(lambda *inputs, impl=impl: attention(*inputs, mask, impl=impl).sum(), argnums=(0, 1, 2))
        programs[impl] = largest(jax.jit(gradient).lower(*inputs).compile().as_text())
    assert programs['xla'] == 2 * length**2
    assert programs['auto'] <= 2 * 512**2


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
    dropped = jax.jit(jax.vmap(lambda k: attention(query, key, value, mask, dropped=Dropped(0.25, k[None]))))(keys)
    assert np.abs(dropped[0] - whole).max() > 0.1
    np.testing.assert_allclose(dropped.mean(axis=0), whole, atol=0.05)


# ------------------------------------------------------------------------------------------ cross-entropy

# 10 real tokens in a padded vocabulary of 16 (or of 10), rows of 6.
CROSS_ENTROPY = {
    'plain': Options(vocab_size=16),
    'padded': Options(vocab_size=10),
    'whole rows': Options(vocab_size=10, chunk=6),
    'one by one': Options(vocab_size=10, chunk=1),
    'a shorter last chunk': Options(vocab_size=10, chunk=4, softcap=1.5, z_loss=0.3, label_smoothing=0.2),
    'a chunk longer than the row': Options(vocab_size=10, chunk=8),
    'soft-cap': Options(vocab_size=10, softcap=1.5),
    'z-loss': Options(vocab_size=10, z_loss=0.3),
    'smoothing': Options(vocab_size=10, label_smoothing=0.2),
    'smoothing, no padding': Options(vocab_size=16, label_smoothing=0.2),
    'everything': Options(vocab_size=10, softcap=1.5, z_loss=0.3, label_smoothing=0.2, chunk=2),
}

HIDDEN, KERNEL, BIAS = normal(0, 3, 6, 5), normal(1, 5, 16), normal(2, 16)
TARGETS = jnp.asarray(np.random.default_rng(2).integers(0, 10, (3, 6)))
WEIGHTS = jnp.array([[1, 1, 0, 1, 0, 0], [0.5, 2, 1, 1, 1, 1], [0] * 6], jnp.float32)


def chunked(hidden, kernel, options, dtype=jnp.float32, bias=None):
    return cross_entropy(hidden, kernel, TARGETS, WEIGHTS, options, jnp.dtype(dtype), bias)


def plain(hidden, kernel, options, bias=None):
    fields = {name: getattr(options, name) for name in ('vocab_size', 'softcap', 'z_loss', 'label_smoothing')}
    nll = fields | {'z_loss': 0.0, 'label_smoothing': 0.0}
    loss, nll = (reference.cross_entropy(hidden, kernel, TARGETS, **f, bias=bias) for f in (fields, nll))
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


@pytest.mark.parametrize('case', ['padded', 'everything'])
def test_a_bias_is_added_to_logits_and_has_its_gradient(case):
    options = dataclasses.replace(CROSS_ENTROPY[case], chunk=4)

    def run(f):
        gradient = jax.value_and_grad(lambda *heads: f(*heads[:2], options, bias=heads[2]), (0, 1, 2), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(HIDDEN, KERNEL, BIAS))

    actual = run(chunked)
    for a, e in zip(actual, run(plain), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    assert not np.asarray(actual[-1][10:]).any()
    without = jax.jit(lambda *heads: chunked(*heads[:2], options, bias=heads[2]))(HIDDEN, KERNEL, BIAS)
    np.testing.assert_allclose(without, actual[:2], rtol=1e-6)


def test_the_gradient_scales_with_what_is_made_of_the_loss():
    options = CROSS_ENTROPY['padded']
    once = jax.grad(lambda h: chunked(h, KERNEL, options)[0])(HIDDEN)
    thrice = jax.grad(lambda h: 3 * chunked(h, KERNEL, options)[0] + 7 * chunked(h, KERNEL, options)[1])(HIDDEN)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)  # nll is a metric: it has no gradient


@pytest.mark.parametrize('case', ['plain', 'padded', 'a shorter last chunk', 'soft-cap'])
def test_log_probs_of_tokens_equal_the_reference(case):
    """By themselves, and with a gradient that weighs each of them by what comes of all."""
    options = CROSS_ENTROPY[case]
    options = Options(vocab_size=options.vocab_size, softcap=options.softcap, chunk=options.chunk or 3)

    def summed(log_probs):
        return jnp.tanh((log_probs * WEIGHTS).sum(axis=1)).sum(), log_probs

    def run(f):
        gradient = jax.value_and_grad(lambda *args: summed(f(*args)), argnums=(0, 1, 2), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(HIDDEN, KERNEL, BIAS))

    def ours(hidden, kernel, bias):
        return token_log_probs(hidden, kernel, TARGETS, options, jnp.dtype('float32'), bias)

    def plain(hidden, kernel, bias):
        fields = {name: getattr(options, name) for name in ('vocab_size', 'softcap', 'z_loss', 'label_smoothing')}
        return -reference.cross_entropy(hidden, kernel, TARGETS, **fields, bias=bias)

    for a, e in zip(run(ours), run(plain), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', CROSS_ENTROPY)
def test_sums_over_tokens_of_what_comes_of_each_log_prob(case):
    """Two sums, of which the first has a gradient; a temperature where logits are not capped."""
    options = CROSS_ENTROPY[case]
    options = Options(vocab_size=options.vocab_size, softcap=options.softcap, chunk=options.chunk or 3)
    temperature = 1.0 if options.softcap else 2.0

    def of_tokens(log_probs, weights):
        return jnp.tanh(log_probs) * weights, jnp.square(log_probs) * weights

    def run(f):
        gradient = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
        return jax.tree.leaves(gradient(HIDDEN, KERNEL, BIAS))

    def ours(hidden, kernel, bias):
        head = TARGETS, (WEIGHTS,), of_tokens, options, jnp.dtype('float32'), bias
        return token_losses(hidden, kernel, *head, temperature)

    def plain(hidden, kernel, bias):
        log_probs = token_log_probs(hidden, kernel, TARGETS, options, jnp.dtype('float32'), bias, temperature)
        return tuple(each.sum() for each in of_tokens(log_probs, WEIGHTS))

    for a, e in zip(run(ours), run(plain), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_log_probs_at_a_temperature():
    options = Options(vocab_size=16)
    warm = token_log_probs(HIDDEN, KERNEL, TARGETS, options, jnp.dtype('float32'), BIAS, temperature=2.0)
    logits = (jnp.einsum('BTD,DV->BTV', HIDDEN, KERNEL) + BIAS[None, None]) / 2
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(warm, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_cross_entropy_sums_in_float32():
    fine = jax.value_and_grad(lambda h: chunked(h, KERNEL, CROSS_ENTROPY['padded'])[0])(HIDDEN)
    coarse = jax.value_and_grad(lambda h: chunked(h, KERNEL, CROSS_ENTROPY['padded'], 'bfloat16')[0])(HIDDEN)
    assert coarse[0].dtype == coarse[1].dtype == jnp.float32
    np.testing.assert_allclose(coarse[0], fine[0], rtol=1e-2)
    np.testing.assert_allclose(coarse[1], fine[1], atol=3e-2)


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


# (positions of a row, positions of the chunks that memory allows): at most 10 of 8 rows and 50,000 tokens in 2^22.
CHUNKS = [(1536, 8), (1531, 10), (2039, 10), (1535, 5), (26, 9), (7, 7), (1, 1)]


@pytest.mark.parametrize(('length', 'chunk'), CHUNKS)
def test_the_chunk_chosen_by_memory_is_near_what_fits_whatever_the_length(length, chunk):
    """1531 and 2039 are primes; the divisors of 26 are 2 and 13."""
    targets, weights = jnp.zeros((8, length), jnp.int32), jnp.ones((8, length))

    def loss(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, weights, Options(vocab_size=50_000), jnp.dtype('float32'))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, length, 4), (4, 50_000)]]
    text = jax.jit(loss).lower(*shapes).as_text()
    assert set(map(int, re.findall(r'tensor<8x(\d+)x50000xf32>', text))) <= {chunk, 1}
    assert f'tensor<8x{chunk}x50000xf32>' in text


def test_rows_of_prime_length_have_the_exact_loss_and_gradient():
    """13 positions in chunks of 4, against float64 NumPy; whole logits exist nowhere."""
    rows, length, vocab = 3, 13, 16
    hidden, kernel = normal(0, rows, length, 5), normal(1, 5, vocab)
    random = np.random.default_rng(2)
    targets, weights = random.integers(0, 10, (rows, length)), random.uniform(0, 2, (rows, length)).astype(np.float32)
    options = Options(vocab_size=10, z_loss=0.1, chunk=4)

    def loss(hidden, kernel):
        return cross_entropy(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights), options, jnp.dtype('float32'))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, nll), (d_hidden, d_kernel) = gradient(hidden, kernel)
    h, k, w = (np.asarray(x, np.float64) for x in (hidden, kernel[:, :10], weights))
    logits = h @ k
    log_z = np.log(np.exp(logits).sum(-1))
    expected = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = np.exp(logits - log_z[..., None])
    d_logits = (p * (1 + 0.2 * log_z[..., None]) - np.eye(10)[targets]) * w[..., None]
    np.testing.assert_allclose(nll, (expected * w).sum(), rtol=1e-6)
    np.testing.assert_allclose(value, ((expected + 0.1 * log_z**2) * w).sum(), rtol=1e-6)
    np.testing.assert_allclose(d_hidden, d_logits @ k.T, atol=1e-5)
    np.testing.assert_allclose(d_kernel[:, :10], np.einsum('btd,btv->dv', h, d_logits), atol=1e-5)
    assert not np.asarray(d_kernel[:, 10:]).any()
    assert largest(gradient.lower(hidden, kernel).compile().as_text()) <= max(rows * 4 * vocab, rows * 16 * 5)


# ------------------------------------------------------------------------------------------ grouped matmul

# Rows, and how many of them belong to each expert; the rest is nobody's. A visit is of 128 rows.
GROUPS = {
    'even': (512, [128] * 4),
    'uneven': (512, [100, 156, 130, 126]),
    'skewed': (512, [2, 480, 29, 1]),
    'empty groups': (300, [0, 200, 0, 100, 0]),
    'one group has all': (300, [0, 0, 300]),
    'one expert': (200, [200]),
    "nobody's tail": (400, [90, 0, 150, 10]),
    "all nobody's": (200, [0, 0]),
    'few rows': (5, [1, 3, 0, 1]),
}


@pytest.mark.parametrize(('impl', 'case'), rows(grouped.IMPLS, GROUPS, megablox=('skewed', "nobody's tail")))
@pytest.mark.parametrize('transposed', [False, True])
def test_grouped_matmul_equals_the_reference(impl, case, transposed):
    count, sizes = GROUPS[case]
    sizes = jnp.array(sizes)
    rows, kernels = normal(0, count, 6) / 6, normal(1, len(sizes), *((5, 6) if transposed else (6, 5)))
    direction = normal(2, count, 5)

    def run(matmul):
        def weighted(rows, kernels):
            out = matmul(rows, kernels)
            return (out * direction).sum(), out

        gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
        (_, out), gradients = gradient(rows, kernels)
        return out, *gradients

    def whole(rows, kernels):
        return reference.grouped_matmul(rows, kernels.swapaxes(1, 2) if transposed else kernels, sizes)

    actual = run(partial(grouped.grouped_matmul, sizes=sizes, impl=impl, transposed=transposed))
    expected = run(whole)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('impl', grouped.IMPLS)
def test_bfloat16_grouped_matmul_sums_in_float32(impl):
    rows, kernels, sizes = normal(0, 300, 64) / 8, normal(1, 2, 64, 5), jnp.array([130, 170])
    direction = normal(2, 300, 5)

    def run(dtype):
        def weighted(rows, kernels):
            out = grouped.grouped_matmul(rows, kernels, sizes, impl=impl)
            return (out.astype(jnp.float32) * direction).sum(), out

        gradient = jax.grad(weighted, argnums=(0, 1), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(rows.astype(dtype), kernels.astype(dtype)))

    for coarse, fine in zip(run(jnp.bfloat16), run(jnp.float32), strict=True):
        assert coarse.dtype == jnp.bfloat16
        error = np.abs(coarse.astype(jnp.float32) - fine).max() / np.abs(fine).max()
        assert error < 0.01  # each side rounded to 8 bits, and the result


@pytest.mark.parametrize('case', GROUPS)
def test_visits_are_the_tiles_that_a_group_overlaps(case):
    count, sizes = GROUPS[case]
    tile = grouped.TILE
    ends = np.cumsum(sizes)
    overlaps = [
        (t, e)
        for e, (size, end) in enumerate(zip(sizes, ends, strict=True))
        for t in range(-(-count // tile))
        if max(t * tile, end - size) < min((t + 1) * tile, end)
    ]
    tiles, groups, total = grouped.visits(jnp.array(sizes), count, tile)
    assert list(zip(tiles[:total].tolist(), groups[:total].tolist(), strict=True)) == overlaps
    # What is executed over what is needed.
    whole = -(-count // tile) * tile
    assert total * tile <= whole + (len(sizes) - 1) * tile


# Rows of a chip's share of a batch, held experts: Mixtral's on v6e (12 rows of 4096 tokens, two choices each),
# DeepSeek-V3's 256 over 64 chips (4 rows of 4096 tokens, eight choices each), and half of Qwen3's 128.
DEPLOYED = [(12 * 4096 * 2, 8), (4 * 4096 * 8, 4), (4 * 4096 * 8, 64)]


@pytest.mark.parametrize('skew', [100.0, 1.0, 0.1])
@pytest.mark.parametrize(('rows', 'experts'), DEPLOYED)
def test_a_deployed_layer_executes_less_than_1_15_times_what_it_needs(rows, experts, skew):
    """However skewed the load; in tiles of the TPU kernel, and so in smaller ones."""
    random = np.random.default_rng(0)
    sizes = random.multinomial(rows, random.dirichlet([skew] * experts))
    tile = megablox.row_tile(rows, experts)
    *_, total = grouped.visits(jnp.asarray(sizes), rows, tile)
    assert 1 <= int(total) * tile / rows <= 1.15


def test_the_kernel_executes_less_than_1_15_times_what_it_needs(monkeypatch):
    """Multiplications counted while the kernel runs interpreted, forward and backward."""
    executed = []

    class Counting:
        def __getattr__(self, name):
            return getattr(jax.lax, name)

        def dot_general(self, a, b, dimension_numbers, **options):
            product = jax.lax.dot_general(a, b, dimension_numbers, **options)
            jax.debug.callback(lambda: executed.append(a.size * product.shape[1]))
            return product

        def dot(self, a, b, **options):
            return self.dot_general(a, b, (((1,), (0,)), ((), ())), **options)

    monkeypatch.setattr(sys.modules[megablox.gmm.__module__], 'lax', Counting())
    count, width, hidden = 4096, 130, 260  # a shape of its own: no other test finds a program that counts
    rows, kernels = normal(0, count, width), normal(1, 4, width, hidden)
    gradient = jax.jit(
        jax.value_and_grad(lambda r, k, sizes: megablox.matmul(r, k, sizes, False, count).sum(), argnums=(0, 1))
    )
    for sizes in ([1024] * 4, [1000, 1100, 996, 1000], [7, 4000, 0, 89]):
        executed.clear()
        jax.block_until_ready(gradient(rows, kernels, jnp.array(sizes)))
        jax.effects_barrier()
        tile = megablox.row_tile(count, 4)
        *_, total = grouped.visits(jnp.array(sizes), count, tile)
        assert sum(executed) == 3 * int(total) * tile * width * hidden
        assert 1 <= sum(executed) / (3 * count * width * hidden) <= 1.15


def test_the_program_is_one_matmul_in_a_loop_over_visits():
    rows, kernels = normal(0, 512, 6), normal(1, 4, 6, 5)
    sizes = jnp.array([512, 0, 0, 0])
    text = jax.jit(grouped.grouped_matmul, static_argnames='impl').lower(rows, kernels, sizes, impl='tiles').as_text()
    assert text.count('stablehlo.dot_general') == 1
    assert f'tensor<{grouped.TILE}x6xf32>, tensor<6x5xf32>' in text

"""Layouts of other libraries, against NumPy written out by hand, and back bit for bit."""

import numpy as np
import pytest

from tpu_llm.checkpoint import layout
from tpu_llm.checkpoint.layout import Part

D, N, K, H = 6, 4, 2, 8
SIZES = {'D': D, 'N': N, 'K': K, 'H': H, 'F': 5}
RNG = np.random.default_rng(0)


def part(theirs, ours, sizes=SIZES, rotary=0):
    return Part(theirs, ours, sizes, rotary)


def ours(*parts):
    return [RNG.normal(size=each.shape) for each in parts]


def test_a_linear_map_of_pytorch_is_transposed_and_flat():
    query = part('(NH)D', 'DNH')
    (mine,) = ours(query)
    assert layout.shape([query]) == (N * H, D)
    np.testing.assert_array_equal(layout.join([mine], [query]), mine.reshape(D, N * H).T)


def test_query_key_and_value_one_after_the_other():
    parts = [part('D(+NH)', 'DNH'), part('D(+KH)', 'DKH'), part('D(+KH)', 'DKH')]
    mine = ours(*parts)
    joined = layout.join(mine, parts)
    assert joined.shape == layout.shape(parts) == (D, (N + 2 * K) * H)
    np.testing.assert_array_equal(joined, np.concatenate([x.reshape(D, -1) for x in mine], axis=1))


def test_query_key_and_value_side_by_side_in_each_head():
    """GPT-NeoX and BLOOM: [N, 3, H] flattened."""
    sizes = SIZES | {'K': N}
    parts = [part('(N+H)D', 'DNH', sizes), part('(K+H)D', 'DKH', sizes), part('(K+H)D', 'DKH', sizes)]
    mine = ours(*parts)
    stacked = np.stack([x.transpose(1, 2, 0) for x in mine], axis=1)
    np.testing.assert_array_equal(layout.join(mine, parts), stacked.reshape(N * 3 * H, D))


def test_query_heads_beside_the_key_and_value_they_share():
    """Falcon: for each key-value head its query heads, then its key, then its value."""
    parts = [part('(K+GH)D', 'DNH'), part('(K+H)D', 'DKH'), part('(K+H)D', 'DKH')]
    query, key, value = ours(*parts)
    by_group = np.concatenate([query.reshape(D, K, N // K, H), key[:, :, None], value[:, :, None]], axis=2)
    np.testing.assert_array_equal(layout.join([query, key, value], parts), by_group.reshape(D, -1).T)


@pytest.mark.parametrize('rotary', [0, 4])
def test_interleaved_pairs_become_halves(rotary):
    """What turns together lies side by side there, half a head apart here."""
    query = part('(Nh)D', 'DNH', rotary=rotary)
    theirs = RNG.normal(size=(N, H, D))
    mine = layout.split(theirs.reshape(N * H, D), [query])[0]
    width = rotary or H
    for pair in range(width // 2):
        np.testing.assert_array_equal(mine[..., pair].T, theirs[:, 2 * pair])
        np.testing.assert_array_equal(mine[..., width // 2 + pair].T, theirs[:, 2 * pair + 1])
    np.testing.assert_array_equal(mine[..., width:].transpose(1, 2, 0), theirs[:, width:])


@pytest.mark.parametrize(
    'specs',
    [
        [('(NH)D', 'DNH')],
        [('(Nh)D', 'DNH')],
        [('D(NH)', 'NHD')],
        [('(+NH)D', 'DNH'), ('(+KH)D', 'DKH'), ('(+KH)D', 'DKH')],
        [('(K+GH)D', 'DNH'), ('(K+H)D', 'DKH'), ('(K+H)D', 'DKH')],
        [('(K+GH)', 'NH'), ('(K+H)', 'KH'), ('(K+H)', 'KH')],
        [('(+F)D', 'DF'), ('(+F)D', 'DF')],
        [('1F', 'F')],
    ],
    ids=str,
)
def test_there_and_back(specs):
    parts = [part(*spec, rotary=4) for spec in specs]
    mine = ours(*parts)
    joined = layout.join(mine, parts)
    assert joined.shape == layout.shape(parts)
    for before, after in zip(mine, layout.split(joined, parts), strict=True):
        np.testing.assert_array_equal(before, after)


def test_what_need_not_be_copied_is_a_view():
    parts = [part('(+NH)D', 'DNH'), part('(+KH)D', 'DKH'), part('(+KH)D', 'DKH')]
    joined = np.zeros(layout.shape(parts))
    assert all(np.shares_memory(joined, each) for each in layout.split(joined, parts))

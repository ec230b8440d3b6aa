"""Where tokens stand: counting, rotating, and the sinusoids of 2017."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpu_llm.kernels import device
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.position import (
    DistancePositions,
    SinusoidalPositions,
    from_segments,
    rotary_angles,
    rotate,
    rotate_whole,
)


def test_positions_count_from_zero_in_every_run_of_a_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0], [0, 0, 3, 3, 3, 1, 1, 2]])
    assert from_segments(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1, 0]]


def angles(position, theta=100.0):
    return rotary_angles(jnp.array([[position]]), 6, theta)


def test_rotation_is_relative_and_keeps_lengths():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))

    def score(t, s):
        return float((rotate(query, angles(t)) * rotate(key, angles(s))).sum())

    assert abs(score(5, 3) - score(102, 100)) < 1e-5
    assert abs(score(5, 3) - score(5, 2)) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotate(query, angles(77))), jnp.linalg.norm(query), rtol=1e-6)
    np.testing.assert_array_equal(rotate(query, angles(0)), query)


def test_rotation_is_in_float32_and_keeps_the_dtype():
    query = jax.random.normal(jax.random.key(0), (1, 1, 1, 6)).astype(jnp.bfloat16)
    exact = rotate(query.astype(jnp.float32), angles(1000))
    np.testing.assert_array_equal(rotate(query, angles(1000)), exact.astype(jnp.bfloat16))


def test_the_way_of_tpus_gives_the_same_bits_forward_and_backward():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)).astype(jnp.bfloat16)
    turns = rotary_angles(jnp.arange(10).reshape(2, 5), 8, 100.0)

    def both(turn):
        y, back = jax.vjp(turn, x)
        return y, *back(y)

    expected, found = both(lambda x: rotate(x, turns)), both(lambda x: rotate_whole(x, *turns))
    for each, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(each, other)


@pytest.mark.parametrize(
    ('platform', 'dtype', 'matmuls'), [('tpu', 'bfloat16', 1), ('tpu', 'float32', 0), ('cpu', 'bfloat16', 0)]
)
def test_heads_stay_whole_where_that_pays(monkeypatch, platform, dtype, matmuls):
    monkeypatch.setattr(device, 'on_tpu', lambda: platform == 'tpu')
    turns = rotary_angles(jnp.arange(10).reshape(2, 5), 8, 100.0)
    text = jax.jit(lambda x: rotate(x, turns)).lower(jnp.zeros((2, 5, 3, 8), dtype)).as_text()
    assert text.count('stablehlo.dot_general') == matmuls


def test_sinusoids_interleave_sine_and_cosine():
    table = SinusoidalPositions(8)(jnp.array([[0, 3]]))
    turns = 3 / 10_000 ** (np.arange(4) / 4)
    np.testing.assert_allclose(table[0, 0], [0, 1] * 4, atol=1e-6)
    np.testing.assert_allclose(table[0, 1, 0::2], np.sin(turns), atol=1e-6)
    np.testing.assert_allclose(table[0, 1, 1::2], np.cos(turns), atol=1e-6)


# ------------------------------------------------------------------------------------------------- Transformer-XL

SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
QUERY, KEY = (jnp.asarray(np.random.default_rng(i).standard_normal((2, 6, 3, 4)), jnp.float32) for i in range(2))
WEIGHTS = {
    name: np.random.default_rng(i).standard_normal(shape)
    for i, (name, shape) in enumerate({'kernel': (8, 3, 4), 'content': (3, 4), 'distance': (3, 4)}.items())
}


def scores(weights, query, key, positions=None, prefix=None):
    """[B, N, T, S] of what is seen, 0 elsewhere."""
    positions = from_segments(SEGMENTS) if positions is None else positions
    module = DistancePositions(8, 3, 4)
    for name, value in weights.items():
        setattr(module, name, nnx.Param(jnp.asarray(value, jnp.float32)))
    mask = Mask(
        query_segments=SEGMENTS,
        query_positions=positions,
        key_segments=SEGMENTS,
        key_positions=positions,
        prefix=prefix,
    )
    query, mask = module(query, mask, 0.5)
    whole = 0.5 * jnp.einsum('BTNH,BSNH->BNTS', query, key) + mask.bias()
    return jnp.where(mask.allowed()[:, None], whole, 0.0)


@pytest.mark.parametrize('prefix', [None, jnp.ones((2, 6), bool)], ids=['causal', 'prefix'])
def test_distances_score_by_the_formula_of_transformer_xl(prefix):
    given = scores(WEIGHTS, QUERY, KEY, prefix=prefix)
    positions, frequencies = np.asarray(from_segments(SEGMENTS)), 10_000.0 ** (-np.arange(4) / 4)
    for b, n, i, j in np.ndindex(2, 3, 6, 6):
        far = positions[b, i] - positions[b, j]
        if SEGMENTS[b, i] != SEGMENTS[b, j] or (far < 0 and prefix is None):
            assert given[b, n, i, j] == 0
            continue
        sinusoids = np.stack([np.sin(far * frequencies), np.cos(far * frequencies)], -1).reshape(-1)
        query, key, u, v = QUERY[b, i, n], KEY[b, j, n], WEIGHTS['content'][n], WEIGHTS['distance'][n]
        expected = (query + u) @ key + (query + v) @ (sinusoids @ WEIGHTS['kernel'][:, n])
        np.testing.assert_allclose(given[b, n, i, j], 0.5 * expected, atol=1e-5)


def test_gradients_of_distances_are_those_of_finite_differences():
    inputs = jax.tree.map(jnp.float32, (WEIGHTS, QUERY, KEY))
    total = jax.jit(lambda *inputs: jnp.sin(scores(*inputs)).sum())
    gradient = jax.grad(total, argnums=(0, 1, 2))(*inputs)
    for leaf, at in zip(jax.tree.leaves(gradient), jax.tree.leaves(inputs), strict=True):
        assert bool(jnp.isfinite(leaf).all())
        assert at.shape == leaf.shape
    step = jax.tree.map(lambda x: 1e-3 * x, inputs)
    up, down = (jax.tree.map(lambda x, s, way=way: x + way * s, inputs, step) for way in (1, -1))
    expected = sum((g * s).sum() for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    assert float(total(*up) - total(*down)) == pytest.approx(float(2 * expected), rel=1e-2)


def test_a_key_farther_away_than_there_are_keys_is_not_scored_wrongly():
    given = scores(WEIGHTS, QUERY, KEY, positions=from_segments(SEGMENTS).at[1, 5].add(3))
    assert bool(jnp.isnan(given[1, :, 5, :3]).all())  # 6 to 8 back
    assert bool(jnp.isfinite(given[1, :, 5, 3:]).all())

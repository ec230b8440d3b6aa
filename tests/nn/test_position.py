"""Where tokens stand: counting, rotating, and the sinusoids of 2017."""

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.nn.position import SinusoidalPositions, from_segments, rotary_angles, rotate


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


def test_sinusoids_interleave_sine_and_cosine():
    table = SinusoidalPositions(8)(jnp.array([[0, 3]]))
    turns = 3 / 10_000 ** (np.arange(4) / 4)
    np.testing.assert_allclose(table[0, 0], [0, 1] * 4, atol=1e-6)
    np.testing.assert_allclose(table[0, 1, 0::2], np.sin(turns), atol=1e-6)
    np.testing.assert_allclose(table[0, 1, 1::2], np.cos(turns), atol=1e-6)

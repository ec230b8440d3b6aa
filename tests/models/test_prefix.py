"""A decoder that is given a prefix: what sees what. Its numbers are in tests/contract/test_objectives.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

GRAPH = toy.graph(toy.config(layers=2))
WEIGHTS = toy.weights(GRAPH)
BATCH = toy.batch([[1, 1, 1, 1, 2, 2, 2, 2], [1] * 6 + [0] * 2])
PREFIX = jnp.array([[1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], bool)


def hidden(weights, tokens, prefix):
    model = GRAPH.bind(weights)
    return model.routed(tokens, segments=BATCH.segments, positions=BATCH.positions, prefix=prefix)[0]


def test_a_place_depends_on_what_it_sees_and_nothing_else():
    """Seen through what changes when each token in turn becomes another."""
    run = jax.jit(hidden)
    before = run(WEIGHTS, BATCH.tokens, PREFIX)
    for row, place in np.ndindex(2, 8):
        tokens = BATCH.tokens.at[row, place].add(1) % 19
        changed = np.any(run(WEIGHTS, tokens, PREFIX) != before, axis=-1)
        same = BATCH.segments[row] == BATCH.segments[row, place]
        later = np.arange(8) >= place
        expected = np.zeros((2, 8), bool)
        expected[row] = np.asarray(same & (later | PREFIX[row, place]))
        np.testing.assert_array_equal(changed[row], expected[row], err_msg=f'{row}, {place}')


def test_an_empty_prefix_changes_no_bit():
    np.testing.assert_array_equal(
        hidden(WEIGHTS, BATCH.tokens, jnp.zeros((2, 8), bool)), hidden(WEIGHTS, BATCH.tokens, None)
    )

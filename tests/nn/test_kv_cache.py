"""The cache is written where its index says, and what was there stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.nn.cache import Cache, LayerCache


def test_keys_and_values_go_to_the_next_slots_in_the_caches_dtype():
    empty = LayerCache(keys=jnp.full((2, 1, 5, 3), -1.0, jnp.bfloat16), values=jnp.full((2, 1, 5, 3), -2.0))
    key, value = jnp.ones((2, 2, 1, 3)), jnp.full((2, 2, 1, 3), 7.0)
    written = empty.write(key, value, jnp.int32(2))
    assert written.keys.dtype == jnp.bfloat16
    assert written.keys[0, 0, :, 0].tolist() == [-1, -1, 1, 1, -1]
    assert written.values[1, 0, :, 2].tolist() == [-2, -2, 7, 7, -2]


def test_new_slots_are_described_before_the_index_moves():
    slots = jnp.zeros((1, 4), jnp.int32)
    cache = Cache(layers=[], segments=slots, positions=slots, index=jnp.int32(1))
    new = cache.append(jnp.array([[1, 1]]), jnp.array([[0, 1]]))
    np.testing.assert_array_equal(new.segments, [[0, 1, 1, 0]])
    np.testing.assert_array_equal(new.positions, [[0, 0, 1, 0]])
    assert new.index == 1


def make_cache(slots, index):
    empty = jnp.zeros((1, slots), jnp.int32)
    return Cache(layers=[], segments=empty, positions=empty, index=jnp.int32(index))


@pytest.mark.parametrize(('index', 'tokens', 'fits'), [(0, 4, True), (2, 2, True), (2, 3, False), (4, 1, False)])
def test_a_full_cache_takes_no_more_tokens(index, tokens, fits):
    new = jnp.ones((1, tokens), jnp.int32)
    cache = make_cache(4, index)
    assert bool(cache.has_room(tokens)) == fits
    if fits:
        cache.append(new, new)
    else:
        with pytest.raises(
            ValueError, match=f'{tokens} more tokens do not fit a cache of 4 slots, {index} of them used'
        ):
            cache.append(new, new)


def test_more_tokens_than_slots_are_an_error_while_tracing_too():
    new = jnp.ones((1, 5), jnp.int32)
    with pytest.raises(ValueError, match='5 more tokens do not fit a cache of 4 slots; make it longer'):
        jax.jit(lambda cache: cache.append(new, new))(make_cache(4, 0))

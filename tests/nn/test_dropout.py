"""Noise that is a function of its key, its row, its site and its layer."""

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.nn.dropout import dropout, row_keys, site_keys

KEYS = row_keys(jax.random.key(0), 4)


def test_a_share_is_zeroed_and_the_rest_scaled_up():
    out = np.asarray(dropout(jnp.ones((4, 25_000)), 0.25, KEYS))
    assert set(np.round(out.ravel(), 5).tolist()) == {0.0, np.float32(1.33333).item()}
    assert abs((out == 0).mean() - 0.25) < 0.01


def test_a_part_of_the_rows_draws_what_the_whole_batch_does():
    whole = dropout(jnp.ones((4, 50)), 0.5, KEYS)
    np.testing.assert_array_equal(dropout(jnp.ones((2, 50)), 0.5, KEYS[1:3]), whole[1:3])
    assert (whole[0] != whole[1]).any()


def test_without_keys_or_rate_it_is_the_identity():
    x = jnp.ones((4, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEYS) is x


def test_the_dtype_stays():
    assert dropout(jnp.ones((4, 3), jnp.bfloat16), 0.5, KEYS).dtype == jnp.bfloat16


def test_every_row_site_and_layer_has_its_own_key_also_where_the_layer_is_traced():
    def data(*args):
        return [tuple(key) for key in jax.random.key_data(site_keys(KEYS, *args)).tolist()]

    keys = {key for site in ('attention', 'mlp_out') for layer in range(3) for key in data(site, layer)}
    assert len(keys) == 24
    traced = jax.jit(lambda layer: jax.random.key_data(site_keys(KEYS, 'attention', layer)))(2)
    assert [tuple(key) for key in traced.tolist()] == data('attention', 2)

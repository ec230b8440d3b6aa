"""Noise that is a function of its key, its site and its layer."""

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.nn.dropout import dropout, site_key

KEY = jax.random.key(0)


def test_a_share_is_zeroed_and_the_rest_scaled_up():
    out = np.asarray(dropout(jnp.ones(100_000), 0.25, KEY))
    assert set(np.round(out, 5).tolist()) == {0.0, np.float32(1.33333).item()}
    assert abs((out == 0).mean() - 0.25) < 0.01


def test_without_key_or_rate_it_is_the_identity():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x


def test_the_dtype_stays():
    assert dropout(jnp.ones(3, jnp.bfloat16), 0.5, KEY).dtype == jnp.bfloat16


def test_every_site_and_layer_has_its_own_key_also_where_the_layer_is_traced():
    def data(*args):
        return tuple(jax.random.key_data(site_key(KEY, *args)).tolist())

    keys = {data(site, layer) for site in ('attention', 'mlp_out') for layer in range(3)}
    assert len(keys) == 6
    traced = jax.jit(lambda layer: jax.random.key_data(site_key(KEY, 'attention', layer)))(2)
    assert tuple(traced.tolist()) == data('attention', 2)

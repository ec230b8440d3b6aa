"""Noise that is a function of (seed, step, row, layer, what): remat, mesh, stages and resume reproduce it.

Every row of a batch has its own key, so that a microbatch of the pipeline draws what the whole batch would have.
"""

import zlib

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Int, Key


def row_keys(key: Key[Array, ''], rows: int) -> Key[Array, ' B']:
    """A key a row, from the step's key."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def site_keys(keys: Key[Array, ' B'], site: str, layer: Int[Array, ''] | int = 0) -> Key[Array, ' B']:
    """The rows' keys of one site ('attention', 'mlp_out', …) in one layer."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(fold(keys, zlib.crc32(site.encode())), layer)


def dropout(x: Float[Array, 'B ...'], rate: float, keys: Key[Array, ' B'] | None) -> Float[Array, 'B ...']:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); without keys, x itself."""
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))

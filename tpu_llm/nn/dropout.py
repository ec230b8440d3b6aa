"""Dropout whose noise is a function of (key, what, layer): remat, mesh and resume reproduce it."""

import zlib

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Int, Key


def site_key(key: Key[Array, ''], site: str, layer: Int[Array, ''] | int = 0) -> Key[Array, '']:
    """The key of one dropout site ('attention', 'residual', …) in one layer, from the step's key."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(site.encode())), layer)


def dropout(x: Float[Array, '...'], rate: float, key: Key[Array, ''] | None) -> Float[Array, '...']:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); without a key, x itself."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))

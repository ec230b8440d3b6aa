"""Where a token stands: rotary angles, learned and sinusoidal tables."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.nn.param import Normal, param


def from_segments(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Positions that count from 0 in each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotary_angles(
    positions: Int[Array, 'B T'], head_dim: int, theta: float
) -> tuple[Float[Array, 'B T {head_dim}//2'], Float[Array, 'B T {head_dim}//2']]:
    """sin and cos of position * theta^(-2i/H), float32 (RoPE: Su et al., 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    x: Float[Array, 'B T N H'], angles: tuple[Float[Array, 'B T H//2'], Float[Array, 'B T H//2']]
) -> Float[Array, 'B T N H']:
    """Turns each pair (x[i], x[i + H/2]) by its angle, in float32; the result has x's dtype."""
    sin, cos = (each[:, :, None, :] for each in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class LearnedPositions(nnx.Module):
    """A learned vector for each of the first `length` positions."""

    def __init__(self, length: int, width: int):
        self.table = param('TD', (length, width), Normal(0.02))

    def __call__(self, positions: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        return self.table[...][positions]


class SinusoidalPositions(nnx.Module):
    """sin and cos of geometric frequencies from 1 to 1/10,000, interleaved (Vaswani et al., 2017, §3.5)."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, positions: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        sin, cos = rotary_angles(positions, self.width, 10_000.0)
        return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, self.width)

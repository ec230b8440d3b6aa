"""Where a token stands: rotary angles, learned and sinusoidal tables, and what scores gain by distance."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.kernels import device
from tpu_llm.kernels.mask import BUCKETS, Mask
from tpu_llm.nn.einsum import add_trailing
from tpu_llm.nn.param import Constant, Normal, param
from tpu_llm.nn.rope_scaling import RopeScaling


def from_segments(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Positions that count from 0 in each run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


Angles = tuple[Float[Array, 'B T _'], Float[Array, 'B T _']]  # sin and cos, of half as many pairs as numbers turn


def rotary_angles(positions: Int[Array, 'B T'], dim: int, theta: float) -> Angles:
    """sin and cos of position * theta^(-2i/dim), float32 (RoPE: Su et al., 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.sin(angles), jnp.cos(angles)


def scaled_angles(
    positions: Int[Array, 'B T'], real: Bool[Array, 'B T'], dim: int, theta: float, scaling: RopeScaling
) -> Angles:
    """`rotary_angles` by a scheme for longer rows; a row is as long as its last real position says."""
    length = jnp.where(real, positions, 0).max(axis=1) + 1
    frequencies, factor = scaling.frequencies(dim, theta, length)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies.reshape(-1, 1, dim // 2)
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x: Float[Array, 'B T N H'], angles: Angles) -> Float[Array, 'B T N H']:
    """Turns each pair (x[i], x[i + J/2]) of the first J numbers, as many as have angles, by its angle, in float32.

    The result has x's dtype.
    """
    turned = 2 * angles[0].shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], angles), x[..., turned:]], axis=-1)
    if x.dtype == jnp.bfloat16 and device.on_tpu():
        return rotate_whole(x, *angles)
    sin, cos = (each[:, :, None, :] for each in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def rotate_whole(
    x: Float[Array, 'B T N H'], sin: Float[Array, 'B T H//2'], cos: Float[Array, 'B T H//2']
) -> Float[Array, 'B T N H']:
    """The same bits for bfloat16, without cutting heads in halves: a matmul with a permutation, exact, swaps them.

    A TPU's vectors have 128 lanes. Half a head fills half of them, and cutting and joining heads are a copy each.
    """
    width = x.shape[-1]
    swap = jnp.roll(jnp.eye(width, dtype=x.dtype), width // 2, axis=1)
    swapped = jnp.einsum('BTNH,HJ->BTNJ', x, swap).astype(jnp.float32)
    signed = jnp.concatenate([-sin, sin], axis=-1)[:, :, None, :]
    return (x.astype(jnp.float32) * jnp.tile(cos, 2)[:, :, None, :] + swapped * signed).astype(x.dtype)


def _forward(x: Array, sin: Array, cos: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate_whole(x, sin, cos), (sin, cos)


def _backward(angles: tuple[Array, Array], d_y: Array) -> tuple[Array, None, None]:
    """The gradient of a turn is the turn back; angles have none."""
    sin, cos = angles
    return rotate_whole(d_y, -sin, cos), None, None


rotate_whole.defvjp(_forward, _backward)


class LearnedPositions(nnx.Module):
    """A learned vector for each of the first `length` positions, after `offset` rows of the table that none uses."""

    def __init__(self, length: int, width: int, *, offset: int = 0):
        self.offset = offset
        self.table = param('TD', (offset + length, width), Normal(0.02))

    def __call__(self, positions: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        return self.table[...][positions + self.offset if self.offset else positions]


class RelativePositions(nnx.Module):
    """What scores gain by the distance of a query and a key, a number for each bucket of distances (`mask.bucket`) and
    head (T5: Raffel et al., 2019, arXiv 1910.10683, section 2.1). All layers share one, or each has its own.
    """

    def __init__(self, heads: int, *, std: float):
        self.table = param('AN', (BUCKETS, heads), Normal(std))

    def of_rows(self, rows: int) -> Float[Array, 'B A N']:
        """The table for each of them."""
        return jnp.broadcast_to(self.table[...][None], (rows, *self.table.shape))


class DistancePositions(nnx.Module):
    """Of Transformer-XL (Dai et al., 2019, arXiv 1901.02860, section 3.3): a query q at i scores a key k at j as
    (q + u) · k + (q + v) · W R(i - j), with u and v of a head, W of a layer and R the sinusoids of the distance.

    The second part, of every query with each distance there can be, and then picked for each key, is two arrays
    float32[B N T S]; as many bytes again as the scores, twice. It needs distances below S, the number of keys, which
    positions that count within segments have.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        self.width = width
        self.kernel = param('DNH', (width, heads, head_dim), Normal(width**-0.5), summed='D')
        self.content = param('NH', (heads, head_dim), Constant(0.0))  # u
        self.distance = param('NH', (heads, head_dim), Constant(0.0))  # v

    def __call__(
        self, query: Float[Array, 'B T N H'], mask: Mask, scale: float
    ) -> tuple[Float[Array, 'B T N H'], Mask]:
        """q + u, and the mask with what `scale` leaves of the second part."""
        keys = mask.key_segments.shape[1]
        distances = jnp.arange(0 if mask.prefix is None else 1 - keys, keys)
        sinusoids = SinusoidalPositions(self.width)(distances[None])[0].astype(query.dtype)
        # The einsum's order is the cheapest one: of a few tokens that decode, queries meet W before distances do.
        by_distance = jnp.einsum(
            'BTNH,DNH,AD->BNTA',
            add_trailing(query, self.distance[...]) * scale,
            self.kernel[...].astype(query.dtype),
            sinusoids,
            preferred_element_type=jnp.float32,
        )
        return add_trailing(query, self.content[...]), dataclasses.replace(mask, by_distance=by_distance)


class SinusoidalPositions(nnx.Module):
    """sin and cos of geometric frequencies from 1 to 1/10,000, interleaved (Vaswani et al., 2017, §3.5)."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, positions: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        sin, cos = rotary_angles(positions, self.width, 10_000.0)
        return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, self.width)

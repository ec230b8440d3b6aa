"""What sees what, and what scores gain by distance: a few small arrays instead of one of T x S."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Bool, Float, Int

BUCKETS = 32  # of T5's distances
FAR = 128  # from this distance on, all are in the last bucket


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A query sees a key of its own segment, not later than itself if causal (unless the key is part of a `prefix`,
    which is seen whole), less than `window` positions back.

    Positions count within segments, so the same four arrays describe packed rows, padded prompts, caches and any piece
    of them. Padding (segment 0) sees only padding. Scores may depend on the distance too: by ALiBi's `slopes`, by T5's
    `relative` (one table a row, all equal), or by what each query makes of distances (`by_distance`: Transformer-XL).
    """

    query_segments: Int[Array, 'B T']
    query_positions: Int[Array, 'B T']
    key_segments: Int[Array, 'B S']
    key_positions: Int[Array, 'B S']
    prefix: Bool[Array, 'B S'] | None = None
    relative: Float[Array, 'B A N'] | None = None
    by_distance: Float[Array, 'B N T A'] | None = None  # of 0 to A - 1; with a prefix, of 1 - S to S - 1 (A = 2 S - 1)
    slopes: tuple[float, ...] = dataclasses.field(default=(), metadata={'static': True})  # one a head
    causal: bool = dataclasses.field(default=True, metadata={'static': True})
    window: int = dataclasses.field(default=0, metadata={'static': True})  # 0: no limit

    @property
    def biased(self) -> str:
        """The scheme of positions by which scores depend on the distance, or an empty string."""
        if self.by_distance is not None:
            return 'transformer_xl'
        return 'relative' if self.relative is not None else 'alibi' if self.slopes else ''

    def allowed(self) -> Bool[Array, 'B T S']:
        seen = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = self.distance()
        if self.causal:
            earlier = distance >= 0
            seen &= earlier if self.prefix is None else earlier | self.prefix[:, None, :]
        if self.window:
            seen &= jnp.abs(distance) < self.window
        return seen

    def distance(self) -> Int[Array, 'B T S']:
        """How far back the key is."""
        return self.query_positions[:, :, None] - self.key_positions[:, None, :]

    def bias(self) -> Float[Array, 'B N T S']:
        """What is added to scaled (and soft-capped) scores, float32; only where the mask is `biased`.

        NaN where a visible key is farther away than `by_distance` goes.
        """
        if self.by_distance is not None:
            distance = self.distance() + (0 if self.prefix is None else self.by_distance.shape[-1] // 2)
            pick = jax.vmap(_at, in_axes=(1, 0), out_axes=1)  # query by query
            return jax.vmap(pick)(self.by_distance, distance)
        if self.relative is None:
            slopes = jnp.asarray(self.slopes, jnp.float32)[None, :, None, None]
            return -slopes * jnp.abs(self.distance())[:, None].astype(jnp.float32)
        buckets = jnp.asarray(_buckets(self.causal))[jnp.clip(self.distance(), -FAR, FAR) + FAR]
        # Transposed first: heads that are split over devices stay where they are.
        return jax.vmap(lambda table, buckets: table.T[:, buckets])(self.relative.astype(jnp.float32), buckets)


def alibi_slopes(heads: int, most: float = 8.0, scale: float = 1.0) -> tuple[float, ...]:
    """scale · 2^(-most · i/N) for the heads 1 to N; where N is no power of two, those of the next lower one,
    then every second one of twice as many (Press et al., 2021, arXiv 2108.12409, and the code published with it).
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [scale * 2.0 ** (-most * i / whole) for i in range(1, whole + 1)]
    between = [scale * 2.0 ** (-most / 2 * i / whole) for i in range(1, 2 * whole + 1, 2)]
    return tuple(slopes + between[: heads - whole])


def bucket(distance: int, causal: bool) -> int:
    """T5's bucket of a key so far back: near distances have their own, farther ones share one with ever more others
    (Raffel et al., 2019, arXiv 1910.10683, section 2.1, and the code published with it). Unless causal, half of the
    buckets are those of keys that come later.
    """
    count = BUCKETS if causal else BUCKETS // 2
    first = count if distance < 0 and not causal else 0
    far = max(distance, 0) if causal else abs(distance)
    own = count // 2
    if far < own:
        return first + far
    # Rounded first: a power of the ratio is a whole bucket, whatever the last bit of its logarithm says.
    step = round(math.log(far / own) / math.log(FAR / own) * (count - own), 6)
    return first + min(own + math.floor(step), count - 1)


def _at(by_distance: Float[Array, 'N A'], distances: Int[Array, ' S']) -> Float[Array, 'N S']:
    # All heads at once: those that are split over devices stay where they are.
    return by_distance.at[:, distances].get(mode='fill', fill_value=jnp.nan)


@functools.cache
def _buckets(causal: bool) -> np.ndarray:
    """int32[2 FAR + 1]: the bucket of every distance from -FAR to FAR."""
    return np.array([bucket(distance, causal) for distance in range(-FAR, FAR + 1)], np.int32)

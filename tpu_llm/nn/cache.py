"""The cache of decoding: what was seen, per layer, and where the next token goes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, or of L stacked ones ('LBKSH').

    Heads lie outside slots: what one head reads is a matrix, which need not be brought together for every token.
    Of latent attention (`nn/mla.py`) the keys are one head of latents, from which values are made too: U is 0. With
    cross-attention `source` holds the source's, which no step changes.
    """

    keys: Float[Array, '*L B K S H']
    values: Float[Array, '*L B K S U']
    source: 'LayerCache | None' = None

    @classmethod
    def of(cls, key: Float[Array, 'B S K H'], value: Float[Array, 'B S K U']) -> 'LayerCache':
        """A cache that holds these and has no room for more."""
        return cls(keys=key.swapaxes(1, 2), values=value.swapaxes(1, 2))

    def read(self, dtype: jnp.dtype) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K U']]:
        """Keys and values as attention takes them, of one layer."""
        return self.keys.swapaxes(1, 2).astype(dtype), self.values.swapaxes(1, 2).astype(dtype)

    def write(
        self, key: Float[Array, 'B T K H'], value: Float[Array, 'B T K U'], index: Int[Array, '']
    ) -> 'LayerCache':
        """Slots index … index + T - 1 now hold `key` and `value`. Without `source`, which would be copied."""
        new, at = LayerCache.of(key, value), (0, 0, index, 0)
        return LayerCache(
            keys=placed(jax.lax.dynamic_update_slice(self.keys, new.keys.astype(self.keys.dtype), at), 'BKSH'),
            values=placed(jax.lax.dynamic_update_slice(self.values, new.values.astype(self.values.dtype), at), 'BKSH'),
        )


def placed(x: Array, dims: str) -> Array:
    """Marks where what a cache holds lies."""
    layout = sharding.current()
    return x if layout is None else sharding.constrain(x, dims, layout.rules.cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StateCache:
    """What one state space layer remembers, or L stacked ones: of one size, however many tokens it was."""

    inputs: tuple[Float[Array, '...'], ...]  # what its convolutions took of the last W - 1 tokens
    segments: Int[Array, '...']  # of those tokens; 0 where there were none yet
    state: Float[Array, '...']  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The caches of all layers and, shared by them, the segment and position of every slot. `index` is the next slot.

    Prompts of unequal length are padded on the left, so all rows write the same slot and segment 0 hides the padding.
    """

    layers: list[LayerCache | StateCache]
    segments: Int[Array, 'B S']
    positions: Int[Array, 'B S']
    index: Int[Array, '']
    source_segments: Int[Array, 'B _'] | None = None

    def append(self, segments: Int[Array, 'B T'], positions: Int[Array, 'B T']) -> 'Cache':
        """The same caches with the slots of T new tokens described; `index` still points at the first of them.

        Raises ValueError where the cache has no room for them and `index` is known, that is, outside a traced function.
        """
        self._check_room(segments.shape[1])
        at = (0, self.index)
        return dataclasses.replace(
            self,
            segments=jax.lax.dynamic_update_slice(self.segments, segments.astype(jnp.int32), at),
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), at),
        )

    def has_room(self, tokens: int) -> Bool[Array, '']:
        """Whether there are slots for so many more tokens; writing past the end would overwrite the last ones."""
        return self.index + tokens <= self.segments.shape[1]

    def _check_room(self, tokens: int) -> None:
        slots = self.segments.shape[1]
        used = 0 if isinstance(self.index, Tracer) else int(self.index)
        if used + tokens > slots:
            of_them = f', {used} of them used' if used else ''
            raise ValueError(
                f'{tokens} more tokens do not fit a cache of {slots} slots{of_them}; make it longer '
                '(model.empty_cache(batch, length))'
            )

"""The key-value cache of decoding: what was seen, per layer, and where the next token goes."""

import dataclasses

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, or of L stacked ones ('LBSKH')."""

    keys: Float[Array, '*L B S K H']
    values: Float[Array, '*L B S K H']

    def write(
        self, key: Float[Array, 'B T K H'], value: Float[Array, 'B T K H'], index: Int[Array, '']
    ) -> 'LayerCache':
        """Slots index … index + T - 1 now hold `key` and `value`."""
        at = (0, index, 0, 0)
        return LayerCache(
            keys=_constrain(jax.lax.dynamic_update_slice(self.keys, key.astype(self.keys.dtype), at)),
            values=_constrain(jax.lax.dynamic_update_slice(self.values, value.astype(self.values.dtype), at)),
        )


def _constrain(x: Float[Array, 'B S K H']) -> Float[Array, 'B S K H']:
    layout = sharding.current()
    return x if layout is None else sharding.constrain(x, 'BSKH', layout.rules.cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The caches of all layers and, shared by them, the segment and position of every slot. `index` is the next slot.

    Prompts of unequal length are padded on the left, so all rows write the same slot and segment 0 hides the padding.
    """

    layers: list[LayerCache]
    segments: Int[Array, 'B S']
    positions: Int[Array, 'B S']
    index: Int[Array, '']

    def append(self, segments: Int[Array, 'B T'], positions: Int[Array, 'B T']) -> 'Cache':
        """The same caches with the slots of T new tokens described; `index` still points at the first of them."""
        at = (0, self.index)
        return dataclasses.replace(
            self,
            segments=jax.lax.dynamic_update_slice(self.segments, segments.astype(jnp.int32), at),
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), at),
        )

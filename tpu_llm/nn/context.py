"""What every layer of one forward pass shares, and what each of them gives back beside its activations."""

import dataclasses

import jax

from tpu_llm.arrays import Array, Bool, Float, Int, Key
from tpu_llm.kernels.attention import Mask
from tpu_llm.nn.cache import Cache, LayerCache, StateCache
from tpu_llm.nn.position import Angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What cross-attention looks at: a target sees the source of its own segment."""

    segments: Int[Array, 'B S']
    hidden: Float[Array, 'B S D'] | None = None  # None where its keys and values are in the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The rows' layout, what positions do to heads and scores, the cache, and the keys of everything drawn in training.

    Every array leads with B.
    """

    segments: Int[Array, 'B T']
    positions: Int[Array, 'B T']
    prefix: Bool[Array, 'B T'] | None = None  # tokens that all of their segment sees
    angles: Angles | None = None
    local_angles: Angles | None = None  # of layers with a window; None: they turn as the others
    relative: Float[Array, 'B A N'] | None = None  # what scores gain, by bucket of distance
    slopes: tuple[float, ...] = dataclasses.field(default=(), metadata={'static': True})  # of ALiBi, one a head
    causal: bool = dataclasses.field(default=True, metadata={'static': True})  # nothing sees what comes later
    source: Source | None = None
    cache: Cache | None = None
    keys: Key[Array, ' B'] | None = None  # None outside training: nothing is dropped or jittered

    @property
    def real(self) -> Bool[Array, 'B T']:
        return self.segments != 0

    def turns(self, window: int) -> Angles | None:
        """The angles of a layer."""
        return self.local_angles if window and self.local_angles is not None else self.angles

    def mask(self, *, window: int) -> Mask:
        keys = self if self.cache is None else self.cache
        return Mask(
            query_segments=self.segments,
            query_positions=self.positions,
            key_segments=keys.segments,
            key_positions=keys.positions,
            causal=self.causal,
            window=window,
            prefix=self.prefix,
            relative=self.relative,
            slopes=self.slopes,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What a layer of experts did with a batch: means over its real tokens. Stacked layers lead with L."""

    loss: Float[Array, '*L']  # the auxiliary losses, weighted by their coefficients
    load: Float[Array, '*L E']  # share of all choices that went to each expert
    entropy: Float[Array, '*L']  # of a token's distribution over experts, nats
    dropped: Float[Array, '*L']  # share of choices without a place; where experts choose, of tokens nobody took


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerOut:
    """What a layer returns beside x: its cache with the new tokens in it, and its routing if it has experts."""

    cache: LayerCache | StateCache | None = None
    routing: Routing | None = None

"""Prefix tuning: learned keys and values of P positions before every text, in each layer (Li and Liang, 2021,
arXiv 2101.00190), learned directly and not through an MLP.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.attention import Attention
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.context import Context, Routing
from tpu_llm.nn.param import Normal
from tpu_llm.nn.position import from_segments
from tpu_llm.nn.stack import Stack
from tpu_llm.peft.prompts import Behind, check_decoder
from tpu_llm.peft.wrapping import Kind, beside, mixed


@dataclasses.dataclass(kw_only=True, slots=True)
class Prefix(Kind):
    """`length` keys and values in every layer."""

    length: int = 20
    most: int = 1  # texts that a row may have; of more, nothing comes out but NaN

    def validate(self) -> None:
        for name in ('length', 'most'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} = {getattr(self, name)} must be at least 1')

    def wrap(self, model: nnx.Module) -> None:
        """Raises ConfigError for what is no decoder, and for layers without plain attention."""
        check_decoder(model, 'prefixes')
        decoder: Any = model
        for block in _blocks(decoder.stack):
            attention: Any = block.attention
            if type(attention) is not Attention:
                raise ConfigError(
                    f'prefixes are keys and values of plain attention; a layer has {type(attention).__name__}'
                )
            self._wrap(attention)
        decoder.max_length = max(decoder.max_length - self.length, 0)
        decoder.prompt, decoder.most_texts = self.length, self.most
        decoder.__class__ = mixed(Prefixed, type(decoder))

    def _wrap(self, attention: Any) -> None:
        shape = (self.length, *attention.key.kernel.shape[-2:])
        attention.prefix_keys = beside(attention.key, 'TKH', shape, Normal(0.02))
        attention.prefix_values = beside(attention.value, 'TKH', shape, Normal(0.02))
        attention.most_texts = self.most
        attention.__class__ = PrefixedAttention

    def trains(self, path: str) -> bool:
        return path.rpartition('.')[2] in ('prefix_keys', 'prefix_values')


def _blocks(stack: Stack) -> list[Any]:
    return [*stack.prefix, *stack.period, *stack.suffix]


class PrefixedAttention(Attention):
    """Attention in which every text sees the prefix; where there is a cache, that holds it."""

    prefix_keys: nnx.Param
    prefix_values: nnx.Param
    most_texts: int

    def seen(
        self, key: Float[Array, 'B S K H'], value: Float[Array, 'B S K H'], context: Context
    ) -> tuple[Float[Array, 'B _ K H'], Float[Array, 'B _ K H'], Mask]:
        key, value, mask = super().seen(key, value, context)
        if context.cache is not None:
            return key, value, mask
        length, most = self.prefix_keys.shape[-3], self.most_texts

        def before(x: Array, prefix: Array) -> Array:
            """The prefix, once for each text."""
            prefix = jnp.tile(prefix.astype(x.dtype)[None], (1, most) + (1,) * (prefix.ndim - 1))
            return jnp.concatenate([jnp.broadcast_to(prefix, (len(x), *prefix.shape[1:])), x], axis=1)

        numbers = jnp.repeat(jnp.arange(1, most + 1), length)
        segments = jnp.broadcast_to(numbers[None], (len(key), length * most))
        given = None if mask.prefix is None else before(mask.prefix, jnp.ones(length, bool))
        mask = dataclasses.replace(
            mask,
            key_segments=jnp.concatenate([segments, mask.key_segments], axis=1),
            key_positions=before(mask.key_positions, jnp.arange(length)),
            prefix=given,
        )
        return before(key, self.prefix_keys[...]), before(value, self.prefix_values[...]), mask


class Prefixed(Behind):
    """A decoder whose layers have prefixes."""

    stack: Stack

    def routed(
        self,
        tokens: Int[AnyArray, 'B T'],
        *,
        segments: Int[AnyArray, 'B T'] | None = None,
        positions: Int[AnyArray, 'B T'] | None = None,
        prefix: Bool[AnyArray, 'B T'] | None = None,
        key: Key[Array, ''] | None = None,
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        tokens = jnp.asarray(tokens)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
        positions = (from_segments(segments) if positions is None else jnp.asarray(positions)) + self.prompt
        x, routing = super().routed(tokens, segments=segments, positions=positions, prefix=prefix, key=key)  # pyright: ignore
        return self.few(x, segments), routing

    def empty_cache(self, batch: int, length: int) -> Cache:
        """With the prefixes in it already."""
        cache = super().empty_cache(batch, self.prompt + length)  # pyright: ignore
        learned = self.stack.each(lambda block: (block.attention.prefix_keys[...], block.attention.prefix_values[...]))
        number = jnp.arange(self.prompt)[None]
        return dataclasses.replace(
            cache,
            layers=[self._filled(layer, *own) for layer, own in zip(cache.layers, learned, strict=True)],
            segments=cache.segments.at[:, : self.prompt].set(1),
            positions=cache.positions.at[:, : self.prompt].set(number),
            index=cache.index + self.prompt,
        )

    def _filled(self, layer: LayerCache, keys: Array, values: Array) -> LayerCache:
        def first(cache: Array, prefix: Array) -> Array:
            """[*L P K H] into [*L B K S H], for every row."""
            heads = jnp.expand_dims(prefix.swapaxes(-3, -2), -4).astype(cache.dtype)
            return cache.at[..., : self.prompt, :].set(jnp.broadcast_to(heads, (*cache.shape[:-2], *heads.shape[-2:])))

        return dataclasses.replace(layer, keys=first(layer.keys, keys), values=first(layer.values, values))

"""Soft prompts: P learned vectors before every text (prompt tuning: Lester et al., 2021, arXiv 2104.08691).

A wrapped model lengthens rows by itself: each text of a row gets its prompt, and the hidden states of the prompts are
cut out again. While decoding, the prompt is in the cache from the start. With several tasks, each row says which prompt
its texts take (`rows.choose`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder import Decoder
from tpu_llm.nn.cache import Cache
from tpu_llm.nn.context import Routing
from tpu_llm.nn.param import param
from tpu_llm.nn.position import from_segments
from tpu_llm.peft import rows
from tpu_llm.peft.wrapping import Kind, mixed


@dataclasses.dataclass(kw_only=True, slots=True)
class SoftPrompts(Kind):
    """A prompt of `length` vectors for each of the tasks."""

    length: int = 20
    tasks: int = 1
    most: int = 1  # texts that a row may have; of more, nothing comes out but NaN

    def validate(self) -> None:
        for name in ('length', 'tasks', 'most'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} = {getattr(self, name)} must be at least 1')

    def wrap(self, model: nnx.Module) -> None:
        """Raises ConfigError for what is no decoder."""
        check_decoder(model, 'soft prompts')
        decoder: Any = model
        embed, table = decoder.embed, decoder.embed.table
        width = table.shape[-1] if embed.widen is None else embed.widen.kernel.shape[-1]
        # As wide as embeddings are.
        init = table.init if not isinstance(table, nnx.Variable) else table.get_metadata('init')
        embed.prompts = param('ATD', (self.tasks, self.length, width), init, added=True)
        embed.__class__ = mixed(PromptedEmbed, type(embed))
        decoder.prompt, decoder.most_texts = self.length, self.most
        decoder.__class__ = mixed(Prompted, type(decoder))

    def trains(self, path: str) -> bool:
        return path == 'embed.prompts'


def check_decoder(model: nnx.Module, what: str) -> None:
    if not isinstance(model, Decoder):
        raise ConfigError(f'{what} are made for decoders; this model is {type(model).__name__}')
    if hasattr(model, 'prompt'):
        raise ConfigError(f'the model has prompts or prefixes already; {what} cannot come on top')


class PromptedEmbed(nnx.Module):
    """An `Embed` that has vectors for ids behind its table too: those of the prompt."""

    table: Any
    prompts: nnx.Param

    def __call__(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T D']:
        first, prompts = self.table.shape[0], self.prompts[...].astype(dtype)
        x = super().__call__(jnp.minimum(tokens, first - 1), dtype)  # pyright: ignore
        tasks, length, _ = prompts.shape
        number = jnp.clip(tokens - first, 0, length - 1)
        if tasks == 1:
            own = prompts[0][number]
        else:
            task = rows.choice(len(tokens), f'there are {tasks} soft prompts')
            own = jnp.take_along_axis(prompts[task], number[..., None], axis=1)
        return jnp.where((tokens >= first)[..., None], own, x)


class Behind(nnx.Module):
    """A decoder whose texts all stand behind `prompt` positions that they can see."""

    prompt: int
    most_texts: int

    def extend(self, tokens: Array, cache: Cache, *, segments: Array, positions: Array) -> tuple[Array, Cache]:
        return super().extend(tokens, cache, segments=segments, positions=positions + self.prompt)  # pyright: ignore

    def few(self, hidden: Float[Array, 'B T D'], segments: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """NaN in rows of more texts than there is a place for."""
        return jnp.where((segments.max(axis=1) <= self.most_texts)[:, None, None], hidden, jnp.nan)


class Prompted(Behind):
    """A decoder that puts its prompt before every text."""

    embed: Any

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
        positions = from_segments(segments) if positions is None else jnp.asarray(positions)
        room = Room.of(segments, self.prompt, self.most_texts)
        first = self.embed.table.shape[0]
        x, routing = super().routed(  # pyright: ignore
            room.put(tokens, first + jnp.arange(self.prompt)),
            segments=room.put(segments, None),
            positions=room.put(positions + self.prompt, jnp.arange(self.prompt)),
            prefix=None if prefix is None else room.put(jnp.asarray(prefix), jnp.ones(self.prompt, bool)),
            key=key,
        )
        return self.few(jnp.take_along_axis(x, room.texts[..., None], axis=1), segments), routing

    def empty_cache(self, batch: int, length: int) -> Cache:
        """With the prompt in it already."""
        cache = super().empty_cache(batch, self.prompt + length)  # pyright: ignore
        number = jnp.broadcast_to(jnp.arange(self.prompt)[None], (batch, self.prompt))
        tokens, ones = self.embed.table.shape[0] + number, jnp.ones_like(number)
        _, cache = super(Behind, self).extend(tokens, cache, segments=ones, positions=number)  # pyright: ignore
        return cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Where the positions of a row go when P are put before each of its texts (segments 1, 2, …)."""

    texts: Int[Array, 'B T']  # of each position, in the longer row
    prompts: Int[Array, 'B M P']  # of the prompt of each text; behind the row where there is no such text
    length: int = dataclasses.field(metadata={'static': True})

    @classmethod
    def of(cls, segments: Int[Array, 'B T'], size: int, most: int) -> 'Room':
        length = segments.shape[1] + size * most
        before = jax.lax.cummax(segments, axis=1)  # texts that have begun; padding stands behind them
        numbers = jnp.arange(1, most + 1)
        there = segments[:, None, :] == numbers[None, :, None]
        first = there.argmax(axis=2) + size * (numbers - 1)[None]
        prompts = first[..., None] + jnp.arange(size)[None, None]
        prompts = jnp.where(there.any(axis=2)[..., None], prompts, length)
        return cls(texts=jnp.arange(segments.shape[1])[None] + size * before, prompts=prompts, length=length)

    def put(self, x: Array, prompt: Array | None) -> Array:
        """The longer row of x; prompts hold `prompt`, or each the number of its text."""

        def row(x: Array, texts: Array, prompts: Array) -> Array:
            numbers = jnp.arange(1, len(prompts) + 1)
            said = numbers[:, None] if prompt is None else prompt[None]
            said = jnp.broadcast_to(said, prompts.shape).astype(x.dtype)
            return jnp.zeros(self.length, x.dtype).at[texts].set(x, mode='drop').at[prompts].set(said, mode='drop')

        return jax.vmap(row)(x, self.texts, self.prompts)

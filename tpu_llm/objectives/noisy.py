"""Next tokens of noisy embeddings: NEFTune, so that fine-tuning on few conversations does not learn them by heart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Batch, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.nn.context import Routing
from tpu_llm.nn.dropout import row_keys, site_keys
from tpu_llm.objectives.next_token import NextToken


@dataclasses.dataclass(kw_only=True, slots=True)
class Noisy(NextToken):
    """`NextToken` with uniform noise of ±alpha / sqrt(T D) on every number of an embedding while it trains, T being the
    tokens of its text (Jain et al., 2023, arXiv 2310.05914, algorithm 1). Without a key nothing is added.
    """

    alpha: float = 5.0

    def validate(self) -> None:
        NextToken.validate(self)
        if not self.alpha > 0:
            raise ConfigError(f'alpha is {self.alpha}; write a number above 0, published are 5, 10 and 15')

    def read(
        self, model: Any, batch: Batch, key: Key[Array, ''] | None
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        if key is not None:
            model = nnx.merge(*nnx.split(model))  # the same arrays in modules of its own
            model.embed = _NoisyEmbed(model.embed, jnp.asarray(batch.segments), self.alpha, key)
        return NextToken.read(self, model, batch, key)


class _NoisyEmbed(nnx.Module):
    """An embedding and the noise of one batch."""

    def __init__(self, embed: nnx.Module, segments: Int[Array, 'B T'], alpha: float, key: Key[Array, '']):
        self.embed = embed
        self.scale = nnx.data(alpha * jax.lax.rsqrt(text_lengths(segments)))
        self.keys = nnx.data(site_keys(row_keys(key, segments.shape[0]), 'noise'))

    def __call__(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T D']:
        x: Array = self.embed(tokens, dtype)  # type: ignore[operator]
        noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1.0, maxval=1.0))(self.keys)
        return x + (noise * self.scale[..., None] * x.shape[-1] ** -0.5).astype(x.dtype)


def text_lengths(segments: Int[Array, 'B T']) -> Float[Array, 'B T']:
    """Of each position, how many positions its segment has."""
    counts = jax.vmap(lambda row: jnp.bincount(row, length=row.shape[0] + 1))(segments)
    return jnp.take_along_axis(counts, segments, axis=1).astype(jnp.float32)

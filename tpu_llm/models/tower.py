"""What stands between embedded tokens and hidden states: positions, layers, and the norms around them.

An encoder is one of them, an encoder-decoder two. Its config is a decoder's, of which it reads what concerns this.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.models.decoder_config import DecoderConfig, Dropout
from tpu_llm.models.mixers import position_embed
from tpu_llm.nn.cache import Cache
from tpu_llm.nn.context import Context, LayerOut, Source
from tpu_llm.nn.dropout import dropout, row_keys, site_keys
from tpu_llm.nn.norm import NORMS
from tpu_llm.nn.position import RelativePositions
from tpu_llm.nn.stack import make_stack
from tpu_llm.parallel.sharding import constrain


class Tower(nnx.Module):
    """`causal`: nothing sees what comes later. Positions are learned, sinusoidal, relative or none."""

    def __init__(self, config: DecoderConfig, make_block: Callable[[DecoderConfig, int], nnx.Module], *, causal: bool):
        self.causal = causal
        self.max_length = config.max_length if config.position == 'learned' else 0
        self.dropout = (config.dropout or Dropout()).embedding
        self.position_embed = position_embed(config)
        relative = config.position == 'relative'
        self.position_bias = RelativePositions(config.heads, std=config.width**-0.5) if relative else None
        make_norm = functools.partial(NORMS[config.norm], config.width, eps=config.norm_eps)
        self.embed_norm = make_norm() if config.embed_norm else None
        self.stack = make_stack(
            lambda index: make_block(config, index), config.layers, remat=config.remat, unroll=config.unroll
        )
        # Post-norm blocks end in a norm already.
        self.norm = make_norm() if config.norm_place != 'post' else None

    def __call__(
        self,
        x: Float[Array, 'B T D'],
        segments: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        *,
        source: Source | None = None,
        cache: Cache | None = None,
        key: Key[Array, ''] | None = None,
    ) -> tuple[Float[Array, 'B T D'], list[LayerOut]]:
        """Hidden states, float32, and what the layers give back. Only where a key is given is anything drawn.

        Raises ValueError for rows longer than the learned positions.
        """
        if 0 < self.max_length < x.shape[1]:
            raise ValueError(f'rows of {x.shape[1]} tokens are longer than the {self.max_length} learned positions')
        context = Context(
            segments=segments,
            positions=positions,
            relative=self._relative(x.shape[0]),
            causal=self.causal,
            source=source,
            cache=cache,
            keys=None if key is None else row_keys(key, x.shape[0]),
        )
        if self.position_embed is not None:
            x = x + self.position_embed(positions).astype(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if context.keys is not None:
            x = dropout(x, self.dropout, site_keys(context.keys, 'embedding'))
        x, outs = self.stack(constrain(x, 'BTD'), context)
        x = x if self.norm is None else self.norm(x)
        return x.astype(jnp.float32), outs

    def _relative(self, rows: int) -> Float[Array, 'B A N'] | None:
        return None if self.position_bias is None else self.position_bias.of_rows(rows)


def as_rows(tokens: jax.typing.ArrayLike, segments: jax.typing.ArrayLike | None) -> tuple[Array, Array]:
    """Tokens and their segments, by default all 1. Raises ValueError for tokens that are not in rows."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f'tokens of shape {list(tokens.shape)}: give rows, [batch, length]; one is tokens[None]')
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    if segments.shape != tokens.shape:
        raise ValueError(f'segments of shape {list(segments.shape)} for tokens of shape {list(tokens.shape)}')
    return tokens, segments

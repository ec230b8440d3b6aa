"""Multi-head latent attention: keys and values of all heads are made from one small vector a token.

DeepSeek-V2, 2024, arXiv 2405.04434, section 2.1. A token's latent [Z] and one rotary key [J] that all heads share are
all that is kept of it: 576 numbers in DeepSeek-V3, where 128 heads of keys and values would be 32,768. While training,
keys and values are spelled out. Against a cache they never are: the map from latent to keys is applied to the queries
instead, the map to values to what was attended, and between them all heads attend to the latents themselves.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError
from tpu_llm.kernels.attention import attention
from tpu_llm.nn.attention import dropped
from tpu_llm.nn.cache import LayerCache
from tpu_llm.nn.context import Context
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.norm import RMSNorm
from tpu_llm.nn.param import Init
from tpu_llm.nn.position import rotate
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class MLA:
    """Widths of latent attention; the decoder's `head_dim` is the part of a query or key that is not rotated."""

    kv_rank: int  # Z, what keys and values are made from
    query_rank: int = 0  # Q, what queries are made from; 0: they are made from the stream
    rope_dim: int = 64  # J, the rotated part of a query or key
    value_dim: int = 128  # U
    norm_eps: float = 0.0  # of the norms of latents; 0: the decoder's

    def validate(self) -> None:
        for name in ('kv_rank', 'rope_dim', 'value_dim'):
            if getattr(self, name) < 1:
                raise ConfigError(f'mla.{name} is {getattr(self, name)}; it must be at least 1')
        if self.norm_eps < 0:
            raise ConfigError(f"mla.norm_eps is {self.norm_eps}; it must not be negative, 0 is the decoder's")
        if self.query_rank < 0:
            raise ConfigError(f'mla.query_rank is {self.query_rank}; it must be at least 0, which is none')
        if self.rope_dim % 2:
            raise ConfigError(f'mla.rope_dim = {self.rope_dim} is odd; rope turns pairs, so make it even')


class LatentAttention(nnx.Module):
    """N heads, each a query and key of H + J (the J rotated) and a value of U."""

    def __init__(
        self,
        config: MLA,
        width: int,
        heads: int,
        head_dim: int,
        *,
        window: int,
        scale: float,
        softcap: float,
        eps: float,
        dropout: float,
        out_init: Init,
        impl: str,
        sequence: str,
    ):
        sizes = {
            'D': width,
            'N': heads,
            'H': head_dim,
            'J': config.rope_dim,
            'U': config.value_dim,
            'Q': config.query_rank,
            'Z': config.kv_rank,
        }
        self.query_down = self.query_norm = None
        source, eps = 'D', config.norm_eps or eps
        if config.query_rank:
            source = 'Q'
            self.query_down = nnx.data(Einsum('BTD,DQ->BTQ', sizes))
            self.query_norm = nnx.data(RMSNorm(config.query_rank, eps=eps, dim='Q'))
        self.query = Einsum(f'BT{source},{source}NH->BTNH', sizes)
        self.query_rope = Einsum(f'BT{source},{source}NJ->BTNJ', sizes)
        self.latent = Einsum('BTD,DZ->BTZ', sizes)
        self.latent_norm = RMSNorm(config.kv_rank, eps=eps, dim='Z')
        self.key_rope = Einsum('BTD,DJ->BTJ', sizes)
        self.key = Einsum('BTZ,ZNH->BTNH', sizes)
        self.value = Einsum('BTZ,ZNU->BTNU', sizes)
        self.out = Einsum('BTNU,NUD->BTD', sizes, init=out_init)
        self.rank = config.kv_rank
        self.scale = scale or (head_dim + config.rope_dim) ** -0.5
        self.window = window
        self.softcap = softcap
        self.dropout = dropout
        self.impl = impl
        self.sequence = sequence

    @jax.named_scope('attention')
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int = 0,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | None]:
        angles = context.turns(self.window)
        assert angles is not None
        latent, key_rope = project(x, (self.latent, self.key_rope))
        latent = checkpoint_name(self.latent_norm(latent), 'latent')
        key_rope = checkpoint_name(rotate(key_rope[:, :, None], angles), 'latent')  # [B, T, 1, J]
        query, query_rope = project(self._query_source(x), (self.query, self.query_rope))
        query_rope = rotate(query_rope, angles)
        if cache is None:
            key = self.key(latent)
            shared = jnp.broadcast_to(key_rope, (*key.shape[:3], key_rope.shape[-1]))
            key, value = (
                constrain(jnp.concatenate([key, shared], axis=-1), 'BTNH'),
                constrain(self.value(latent), 'BTNH'),
            )
        else:
            assert context.cache is not None
            seen = jnp.concatenate([latent[:, :, None], key_rope], axis=-1)
            cache = cache.write(seen, seen[..., :0], context.cache.index)
            key, _ = cache.read(x.dtype)
            value = key[..., : self.rank]
            query = jnp.einsum('BTNH,ZNH->BTNZ', query, self.key.weight().astype(x.dtype))
        attended = attention(
            constrain(jnp.concatenate([query, query_rope], axis=-1), 'BTNH'),
            key,
            value,
            context.mask(window=self.window),
            impl=self.impl,
            sequence=self.sequence if cache is None else None,
            scale=self.scale,
            softcap=self.softcap,
            dropped=dropped(self.dropout, context, layer),
        )
        if cache is not None:
            attended = jnp.einsum('BTNZ,ZNU->BTNU', attended, self.value.weight().astype(x.dtype))
        return self.out(constrain(attended, 'BTNH')), cache

    def _query_source(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D'] | Float[Array, 'B T Q']:
        if self.query_down is None or self.query_norm is None:
            return x
        return self.query_norm(self.query_down(x))

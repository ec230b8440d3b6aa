"""Multi-head attention: project, rotate, attend, project back."""

import dataclasses

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.kernels.attention import Dropped, Mask, attention
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.dropout import site_key
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.param import Init
from tpu_llm.nn.position import rotate
from tpu_llm.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every layer of one forward pass shares."""

    segments: Int[Array, 'B T']
    positions: Int[Array, 'B T']
    angles: tuple[Float[Array, 'B T H//2'], Float[Array, 'B T H//2']] | None = None
    cache: Cache | None = None
    dropout_key: Key[Array, ''] | None = None

    def mask(self, *, causal: bool, window: int) -> Mask:
        keys = self if self.cache is None else self.cache
        return Mask(
            query_segments=self.segments,
            query_positions=self.positions,
            key_segments=keys.segments,
            key_positions=keys.positions,
            causal=causal,
            window=window,
        )


class Attention(nnx.Module):
    """N query heads over K key-value heads: MHA (K = N), GQA, MQA (K = 1)."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int,
        softcap: float,
        dropout: float,
        bias: bool,
        out_init: Init,
        impl: str,
    ):
        sizes = {'D': width, 'N': heads, 'K': kv_heads, 'H': head_dim}
        self.query = Einsum('BTD,DNH->BTNH', sizes, bias=bias)
        self.key = Einsum('BTD,DKH->BTKH', sizes, bias=bias)
        self.value = Einsum('BTD,DKH->BTKH', sizes, bias=bias)
        self.out = Einsum('BTNH,NHD->BTD', sizes, bias=bias, init=out_init)
        self.window = window
        self.softcap = softcap
        self.dropout = dropout
        self.impl = impl

    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int = 0,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | None]:
        query, key, value = project(x, (self.query, self.key, self.value))
        if context.angles is not None:
            query, key = rotate(query, context.angles), rotate(key, context.angles)
        query = checkpoint_name(constrain(query, 'BTNH'), 'query')
        key = checkpoint_name(constrain(key, 'BTKH'), 'key')
        value = checkpoint_name(constrain(value, 'BTKH'), 'value')
        if cache is not None:
            assert context.cache is not None
            cache = cache.write(key, value, context.cache.index)
            key, value = cache.keys.astype(query.dtype), cache.values.astype(query.dtype)
        attended = attention(
            query,
            key,
            value,
            context.mask(causal=True, window=self.window),
            impl=self.impl,
            softcap=self.softcap,
            dropped=self._dropped(context, layer),
        )
        attended = checkpoint_name(constrain(attended, 'BTNH'), 'attended')
        return self.out(attended), cache

    def _dropped(self, context: Context, layer: Int[Array, ''] | int) -> Dropped | None:
        if context.dropout_key is None or self.dropout == 0.0:
            return None
        return Dropped(self.dropout, site_key(context.dropout_key, 'attention', layer))

"""Attention of a target's tokens to their source (Vaswani et al., 2017, arXiv 1706.03762, section 3.2.3)."""

import jax
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.kernels.attention import attention
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.attention import dropped
from tpu_llm.nn.cache import LayerCache
from tpu_llm.nn.context import Context
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Init, Normal
from tpu_llm.parallel.sharding import constrain


class CrossAttention(nnx.Module):
    """N heads. Where there is a cache, the source's keys and values are taken from it and not computed again."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        scale: float,
        dropout: float,
        bias: tuple[str, ...],
        out_init: Init,
        impl: str,
    ):
        sizes = {'D': width, 'N': heads, 'K': heads, 'H': head_dim}
        self.scale = scale or head_dim**-0.5
        query_init = Normal(width**-0.5 * (head_dim**-0.5 / self.scale))  # as in nn/attention.py
        self.query = Einsum('BTD,DNH->BTNH', sizes, bias='qkv' in bias, init=query_init)
        self.key = Einsum('BSD,DKH->BSKH', sizes, bias='qkv' in bias)
        self.value = Einsum('BSD,DKH->BSKH', sizes, bias='qkv' in bias)
        self.out = Einsum('BTNH,NHD->BTD', sizes, bias='out' in bias, init=out_init)
        self.dropout = dropout
        self.impl = 'auto' if impl == 'splash' else impl  # which joins rows to themselves only

    def look_at(self, hidden: Float[Array, 'B S D']) -> LayerCache:
        """Keys and values of a source."""
        return LayerCache.of(constrain(self.key(hidden), 'BSKH'), constrain(self.value(hidden), 'BSKH'))

    @jax.named_scope('cross_attention')
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int = 0,
        cache: LayerCache | None = None,
    ) -> Float[Array, 'B T D']:
        source = context.source
        assert source is not None
        if cache is None:
            assert source.hidden is not None
            seen = self.look_at(source.hidden.astype(x.dtype))
        else:
            assert cache.source is not None
            seen = cache.source
        mask = Mask(
            query_segments=context.segments,
            query_positions=context.positions,
            key_segments=source.segments,
            key_positions=source.segments,  # where a token of the source stands matters to the source alone
            causal=False,
        )
        attended = attention(
            constrain(self.query(x), 'BTNH'),
            *seen.read(x.dtype),
            mask,
            impl=self.impl,
            sequence='gather' if cache is None else None,
            scale=self.scale,
            dropped=dropped(self.dropout, context, layer, 'cross_attention'),
        )
        return self.out(constrain(attended, 'BTNH'))

"""Normalisation over the width, or over heads, computed in float32 whatever the compute dtype."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.einsum import add_trailing
from tpu_llm.nn.param import Constant, param

NormKind = Literal['rms', 'rms_offset', 'layer', 'layer_no_bias', 'layer_fixed']
HeadNormKind = Literal['none', 'head', 'head_biased', 'each_head', 'all_heads']


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale (Zhang and Sennrich, 2019, arXiv 1910.07467).

    With an offset, what multiplies is offset + scale, and drawn as 1 nonetheless (Gemma: 1 + scale).
    """

    def __init__(self, width: int, *, eps: float, dim: str = 'D', offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.scale = param(dim, (width,), Constant(1.0 - offset))

    @jax.named_scope('norm')
    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return _scaled(y, self.scale[...], self.offset).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al., 2016, arXiv 1607.06450); `fixed`, without the two."""

    def __init__(self, width: int, *, eps: float, bias: bool = True, fixed: bool = False):
        self.eps = eps
        self.scale = None if fixed else param('D', (width,), Constant(1.0))
        self.bias = param('D', (width,), Constant(0.0)) if bias and not fixed else None

    @jax.named_scope('norm')
    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y if self.scale is None else _scaled(y, self.scale[...])
        return (y if self.bias is None else add_trailing(y, self.bias[...])).astype(x.dtype)


class HeadNorm(nnx.Module):
    """The norm of queries or keys: of each head by one scale for all ('head': Qwen3; Dehghani et al., 2023, arXiv
    2302.05442), and one bias ('head_biased': Phi), or by its own ('each_head': Cohere), or of all heads together
    ('all_heads': OLMo 2).

    `dims` are those of a token's heads, 'NH' or 'KH'.
    """

    def __init__(self, kind: NormKind, over: HeadNormKind, dims: str, shape: tuple[int, int], *, eps: float):
        self.eps = eps
        self.centred = kind.startswith('layer')
        self.offset = 1.0 if kind == 'rms_offset' else 0.0
        self.axes = (-2, -1) if over == 'all_heads' else (-1,)
        dims, sizes = (dims[1:], shape[1:]) if over.startswith('head') else (dims, shape)
        self.scale = None if kind == 'layer_fixed' else param(dims, sizes, Constant(1.0 - self.offset))
        self.bias = param(dims, sizes, Constant(0.0)) if over == 'head_biased' else None

    @jax.named_scope('norm')
    def __call__(self, x: Float[Array, 'B T N H']) -> Float[Array, 'B T N H']:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=self.axes, keepdims=True) if self.centred else y
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=self.axes, keepdims=True) + self.eps)
        y = y if self.scale is None else _scaled(y, self.scale[...], self.offset)
        return (y if self.bias is None else add_trailing(y, self.bias[...])).astype(x.dtype)


def _scaled(y: Float[Array, '...'], scale: Float[Array, '...'], offset: float = 0.0) -> Float[Array, '...']:
    """y · (offset + scale), over y's last dims."""
    scale = scale + offset if offset else scale
    return y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)


NORMS: dict[NormKind, Callable[..., RMSNorm | LayerNorm]] = {
    'rms': RMSNorm,
    'rms_offset': functools.partial(RMSNorm, offset=1.0),
    'layer': LayerNorm,
    'layer_no_bias': functools.partial(LayerNorm, bias=False),
    'layer_fixed': functools.partial(LayerNorm, fixed=True),
}

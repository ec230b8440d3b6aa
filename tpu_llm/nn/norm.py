"""Normalisation over the width, computed in float32 whatever the compute dtype."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.einsum import add_trailing
from tpu_llm.nn.param import Constant, param

NormKind = Literal['rms', 'layer']


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = param('D', (width,), Constant(1.0))

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * _rows(self.scale[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al., 2016, arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = param('D', (width,), Constant(1.0))
        self.bias = param('D', (width,), Constant(0.0))

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return add_trailing(y * _rows(self.scale[...], y), self.bias[...]).astype(x.dtype)


def _rows(scale: Float[Array, ' D'], like: Float[Array, '*B D']) -> Float[Array, '... D']:
    return scale.reshape((1,) * (like.ndim - 1) + scale.shape)


NORMS: dict[NormKind, type[RMSNorm | LayerNorm]] = {'rms': RMSNorm, 'layer': LayerNorm}

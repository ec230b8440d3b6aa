"""Linear maps written as einsums: one string gives the shape, the fan-in and the dims for sharding."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.param import Constant, Init, Normal, param
from tpu_llm.parallel import sharding


class Einsum(nnx.Module):
    """`Einsum('BTD,DNH->BTNH', {'D': 512, 'N': 8, 'H': 64})`: y = einsum(spec, x, kernel) (+ bias).

    The kernel's dims are the spec's second operand. It is drawn with standard deviation 1/sqrt(fan-in), the fan-in
    being the product of the dims that are summed over. The kernel is float32 and cast to x's dtype at use.
    """

    def __init__(self, spec: str, sizes: Mapping[str, int], *, bias: bool = False, init: Init | None = None):
        inputs, output = spec.split('->')
        _, dims = inputs.split(',')
        summed = [letter for letter in dims if letter not in output]
        self.spec = spec
        self.kernel = param(
            dims,
            tuple(sizes[letter] for letter in dims),
            init or Normal(math.prod(sizes[letter] for letter in summed) ** -0.5),
            summed=''.join(summed),
        )
        kept = ''.join(letter for letter in dims if letter in output)
        self.bias = param(kept, tuple(sizes[d] for d in kept), Constant(0.0)) if bias else None

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        return self.add_bias(jnp.einsum(self.spec, x, self.kernel[...].astype(x.dtype)))

    def add_bias(self, y: Float[Array, '...']) -> Float[Array, '...']:
        return y if self.bias is None else add_trailing(y, self.bias[...])


def project(x: Float[Array, 'B T D'], maps: Sequence[nnx.Module]) -> list[Float[Array, '...']]:
    """Several maps of one input. On a CPU as one matmul: 2 cores run one wide product faster than three narrow.

    Weights that are split over `tensor` stay apart, since joining them would move them.
    """
    if len(maps) == 1 or not _joins(maps):
        return [each(x) for each in maps]
    kernels = [each.kernel[...].astype(x.dtype) for each in maps]
    widths = [math.prod(kernel.shape[1:]) for kernel in kernels]
    joined = jnp.concatenate([k.reshape(k.shape[0], -1) for k in kernels], axis=1)
    starts = [sum(widths[:i]) for i in range(1, len(widths))]
    parts = jnp.split(x @ joined, starts, axis=-1)
    return [
        each.add_bias(part.reshape(*x.shape[:-1], *kernel.shape[1:]))
        for each, part, kernel in zip(maps, parts, kernels, strict=True)
    ]


def _joins(maps: Sequence[nnx.Module]) -> TypeGuard[Sequence[Einsum]]:
    # A wrapped map (LoRA, a quantized one) has its own way to multiply.
    if not all(type(each) is Einsum and each.spec.startswith('BTD,D') for each in maps):
        return False
    layout = sharding.current()
    if layout is None:
        return jax.default_backend() == 'cpu'
    return layout.mesh.devices.flat[0].platform == 'cpu' and layout.mesh.shape['tensor'] == 1


def add_trailing(y: Float[Array, '...'], vector: Float[Array, '...']) -> Float[Array, '...']:
    """y + vector over y's last dims, the vector cast to y's dtype."""
    return y + vector.astype(y.dtype).reshape((1,) * (y.ndim - vector.ndim) + vector.shape)

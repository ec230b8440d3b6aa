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

    def weight(self) -> Float[Array, '...']:
        """The matrix that x is multiplied by, for those who multiply it themselves."""
        return self.kernel[...]

    def add_bias(self, y: Float[Array, '...']) -> Float[Array, '...']:
        return y if self.bias is None else add_trailing(y, self.bias[...])


class Cut(nnx.Module):
    """An Einsum whose kernel is some rows of a matrix that it may share with others; see `nn/joined.py`."""

    def __init__(self, whole: nnx.Variable, start: int, shape: tuple[int, ...], bias: nnx.Param | None):
        self.whole = whole
        self.shape = shape
        self.start, self.stop = start, start + math.prod(shape)
        self.bias = bias

    def __call__(self, x: Float[Array, 'B T ...']) -> Float[Array, '...']:
        return self.of(self.times_whole(x))

    def times_whole(self, x: Float[Array, 'B T ...']) -> Float[Array, 'B T _']:
        """The product with all of the matrix; what is summed over are all dims of x but its first two."""
        return jnp.einsum('BTD,YD->BTY', x.reshape(*x.shape[:2], -1), self.whole[...].astype(x.dtype))

    def of(self, whole: Float[Array, 'B T _']) -> Float[Array, '...']:
        """Its own part of that product."""
        y = whole[..., self.start : self.stop].reshape(*whole.shape[:-1], *self.shape)
        return y if self.bias is None else add_trailing(y, self.bias[...])


def project(x: Float[Array, 'B T D'], maps: Sequence[nnx.Module]) -> list[Float[Array, '...']]:
    """Several maps of one input. On a CPU as one matmul: 2 cores run one wide product faster than three narrow.

    Weights that are split over `tensor` stay apart, since joining them would move them.
    """
    cuts = [each for each in maps if isinstance(each, Cut)]
    if len(cuts) == len(maps):
        whole = cuts[0].times_whole(x)
        return [each.of(whole) for each in cuts]
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

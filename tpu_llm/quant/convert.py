"""A model with its matrices as codes: less memory, and nothing else changes for those who call it.

Products are taken in the dtype of what is multiplied. Norms, routers, positions, convolutions and what state spaces
learn beside their maps stay as they are.
"""

import re
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.nn.attention import Attention
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.embed import Embed, Head
from tpu_llm.nn.mlp import MLP
from tpu_llm.quant.formats import Format, Matrix, product, quantized


class QuantizedEinsum(Einsum):
    """An `Einsum` whose kernel is codes."""

    kernel: Any

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        return self.add_bias(product(self.spec, x, self.kernel))


class QuantizedEmbed(Embed):
    """An `Embed` whose table is codes; only the rows that are looked up are decoded."""

    table: Any

    def looked_up(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T _']:
        return self.table.rows(tokens).astype(dtype)


def quantize(model: nnx.Module, form: Format, but: str = r'.*\.router\..*') -> None:
    """Quantizes, in place, every linear map, embedding and head of a model, with weights or without, its layers stacked
    or not; maps whose paths `but` (a regular expression) matches stay as they are.
    """
    for path, module in _modules(model):
        if type(module) is Einsum and not re.fullmatch(but, '.'.join(map(str, path))):
            _quantize(module, form)
        elif type(module) is Embed:
            _encode(module, 'table', form)
            module.__class__ = QuantizedEmbed
        elif type(module) is Head and isinstance(module.kernel, nnx.Param):
            _encode(module, 'kernel', form)


def _modules(model: nnx.Module) -> list[tuple[Any, Any]]:
    """With their paths, to be changed."""
    return list(nnx.iter_modules(model))


def _encode(module: Any, name: str, form: Format) -> None:
    setattr(module, name, quantized(getattr(module, name), form))


def _quantize(einsum: Any, form: Format) -> None:
    _encode(einsum, 'kernel', form)
    einsum.__class__ = QuantizedEinsum


def int8(model: nnx.Module) -> None:
    """Quantizes, in place, the maps of attention and MLPs: what decoding reads most of."""
    for _, module in _modules(model):
        if isinstance(module, (Attention, MLP)):
            for child in list(vars(module).values()):
                if type(child) is Einsum:
                    _quantize(child, 'int8')


def dequantize(model: nnx.Module) -> None:
    """Back, in place: every matrix of codes as the parameter that it stands for."""
    for _, module in _modules(model):
        for name, child in list(vars(module).items()):
            if isinstance(child, Matrix):
                setattr(module, name, child.parameter())
        if type(module) in (QuantizedEinsum, QuantizedEmbed):
            module.__class__ = type(module).__base__


def plain(of: Einsum, kernel: nnx.Param) -> Einsum:
    """An `Einsum` like another, without what is around that, with this kernel."""
    dims = kernel.get_metadata('dims').removeprefix('L')
    sizes = dict(zip(dims, kernel.shape[-len(dims) :], strict=True))
    made = Einsum(of.spec, sizes, bias=of.bias is not None)
    made.kernel, made.bias = kernel, of.bias
    return made

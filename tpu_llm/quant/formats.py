"""Matrices held as codes: a module that stands where a parameter stood and is read as it was, `kernel[...]`.

Codes lie along the dims of the kernel, so that they are split over a mesh as it is. Nobody trains them, and no product
keeps the matrix it was made of for the backward pass: it is made again there.

- 'nf4': 4 bits, two codes a byte, the code book of normal numbers; each 64 inputs of an output share a scale, and the
  scales are held in 8 bits, 256 of them sharing one (QLoRA: Dettmers et al., 2023, arXiv 2305.14314, section 3 and
  appendix E). Bit for bit that of bitsandbytes wherever the inputs are a multiple of 64; where not, a block ends with
  its row.
- 'int4': the same with fifteen equally spaced codes.
- 'int8': each output has one float32 scale, its largest magnitude over 127 (Dettmers et al., 2022, arXiv 2208.07339,
  section 2.1, by column and without their decomposition of outliers).
"""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import choose

Format = Literal['nf4', 'int4', 'int8']

# Appendix E: quantiles of the normal distribution, scaled to -1 … 1, with an exact 0.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
INT4 = (np.arange(-7, 8) / 7).astype(np.float32)
BOOKS = {'nf4': NF4, 'int4': INT4}

BLOCK = 64  # numbers that share a scale
OUTER = 256  # scales that share one


def dynamic_book() -> np.ndarray:
    """float32[256], sorted: 8 bits of which a run of leading zeros says the decimal exponent and the rest equally
    spaced steps between 0.1 and 1 (Dettmers, 2015, arXiv 1511.04561, section 2.1).
    """
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        # From both ends, in steps of float32: the published numbers to the last bit.
        count = 2**exponent
        steps, step = np.arange(count + 1), float((np.float32(1) - np.float32(0.1)) / np.float32(count))
        edges = np.where(steps <= count // 2, float(np.float32(0.1)) + step * steps, 1.0 - step * steps[::-1])
        edges = edges.astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


DYNAMIC = dynamic_book()


def encode(x: Float[Array, '...'], book: np.ndarray) -> Array:
    """uint8: the nearest code of each number in -1 … 1; of two equally near, the lower."""
    middles = (book[:-1] + book[1:]) / np.float32(2)
    if len(book) > 16:
        return jnp.searchsorted(jnp.asarray(middles), x).astype(jnp.uint8)
    return sum((x > middle).astype(jnp.uint8) for middle in middles)  # pyright: ignore


class Matrix(nnx.Module):
    """What a declared parameter becomes; `summed` are the dims that a product sums over, side by side in the kernel.

    It is seen as [P, I, O]: the dims before those, they themselves, and the dims behind them.
    """

    def __init__(self, of: nnx.Param):
        meta = of.get_metadata()
        self.stacked: bool = meta['dims'].startswith('L')
        self.dims: str = meta['dims'][self.stacked :]
        self.sizes: tuple[int, ...] = of.shape[self.stacked :]
        self.summed: str = meta['summed'] or 'D'
        self.before, behind = self.dims.split(self.summed)
        self.behind: str = behind
        self.layers: tuple[int, ...] = meta['layers']
        self.padding: int = meta['padding']
        self.init = meta['init']
        values = of.get_value()
        whole = jax.vmap(self.encoded) if self.stacked else self.encoded
        run = jax.jit(lambda kernel: whole(kernel))
        # A model without weights becomes one without codes.
        abstract = isinstance(values, jax.ShapeDtypeStruct)
        for name, value in (jax.eval_shape(run, values) if abstract else run(values)).items():
            setattr(self, name, self._param(value, self.held()[name]))

    def _param(self, value: Any, dims: str) -> nnx.Param:
        padding = self.padding if 'V' in dims else 0
        dims = f'L{dims}' if self.stacked else dims
        meta = {'init': None, 'summed': '', 'padding': padding, 'nudge': 0.0, 'added': False, 'layers': self.layers}
        return nnx.Param(value, dims=dims, **meta)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel as it was declared."""
        return (len(self.layers), *self.sizes) if self.stacked else self.sizes

    @property
    def seen(self) -> tuple[int, int, int]:
        """P, I and O."""
        of = dict(zip(self.dims, self.sizes, strict=True))
        p, i, o = (math.prod(of[letter] for letter in letters) for letters in (self.before, self.summed, self.behind))
        return p, i, o

    def around(self, inner: int) -> tuple[int, ...]:
        """The shape of something that has another size where the kernel has its inputs."""
        first = len(self.before)
        return (*self.sizes[:first], inner, *self.sizes[first + len(self.summed) :])

    def __getitem__(self, index: Any) -> Float[Array, '...']:
        """All of it, float32: of every layer of a stacked one, or of the layer that a scan is in."""
        assert index is Ellipsis
        if not self.stacked or self._codes().ndim == len(self.held()['codes']):
            return self.decoded()
        graph, state = nnx.split(self)
        return jax.vmap(lambda state: nnx.merge(graph, state).decoded())(state)

    def _codes(self) -> Any:
        return self.codes.get_value()  # pyright: ignore

    def parameter(self) -> nnx.Param:
        """The parameter that it stands for, with what the codes say."""
        summed = '' if self.summed == 'D' and 'V' in self.dims else self.summed
        dims, abstract = f'L{self.dims}' if self.stacked else self.dims, isinstance(self._codes(), jax.ShapeDtypeStruct)
        value = jax.ShapeDtypeStruct(self.shape, jnp.float32) if abstract else self[...]
        meta = {'init': self.init, 'summed': summed, 'padding': self.padding, 'nudge': 0.0, 'added': False}
        return nnx.Param(value, dims=dims, layers=self.layers, **meta)

    # What a format says; all of one layer:

    def held(self) -> dict[str, str]:
        """Its parameters, and their dims."""
        raise NotImplementedError

    def encoded(self, kernel: Float[Array, '...']) -> dict[str, Array]:
        raise NotImplementedError

    def decoded(self) -> Float[Array, '...']:
        raise NotImplementedError

    def product(self, spec: str, x: Float[Array, '...']) -> Float[Array, '...']:
        """einsum(spec, x, kernel), in x's dtype."""
        return jnp.einsum(spec, x, self.decoded().astype(x.dtype))

    def rows(self, index: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """Some rows of a table 'VD', float32."""
        raise NotImplementedError


class FourBit(Matrix):
    """'nf4' or 'int4'."""

    codes: nnx.Param
    scales: nnx.Param
    outer: nnx.Param
    offset: nnx.Param

    def __init__(self, of: nnx.Param, book: str):
        self.book = book
        super().__init__(of)

    def held(self) -> dict[str, str]:
        codes = f'{self.before}{self.summed[0]}{self.behind}'
        return {'codes': codes, 'scales': f'{self.before}_{self.behind}', 'outer': '_', 'offset': ''}

    @property
    def blocks(self) -> int:
        """Of a row of inputs."""
        return -(-self.seen[1] // BLOCK)

    def encoded(self, kernel: Float[Array, '...']) -> dict[str, Array]:
        p, i, o = self.seen
        blocks = jnp.pad(kernel.astype(jnp.float32).reshape(p, i, o), ((0, 0), (0, self.blocks * BLOCK - i), (0, 0)))
        blocks = blocks.reshape(p, self.blocks, BLOCK, o)
        scales = jnp.abs(blocks).max(axis=2)
        codes = encode(normed(blocks, scales[:, :, None]), BOOKS[self.book]).reshape(p, -1, o)[:, : i + i % 2]
        packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
        # In the order of a matrix [output, input], row by row.
        offset = scales.mean()
        flat = (scales - offset).transpose(0, 2, 1).reshape(-1)
        groups = jnp.pad(flat, (0, -len(flat) % OUTER)).reshape(-1, OUTER)
        outer = jnp.abs(groups).max(axis=1)
        inner = encode(normed(groups, outer[:, None]), DYNAMIC).reshape(-1)[: len(flat)]
        return {
            'codes': packed.reshape(self.around(packed.shape[1])),
            'scales': inner.reshape(p, o, self.blocks).transpose(0, 2, 1).reshape(self.around(self.blocks)),
            'outer': outer,
            'offset': offset,
        }

    def decoded(self) -> Float[Array, '...']:
        p, i, o = self.seen
        outer = jnp.repeat(self.outer[...], OUTER)[: p * o * self.blocks]
        outer = outer.reshape(p, o, self.blocks).transpose(0, 2, 1).reshape(self.around(self.blocks))
        scales = self._scales(self.scales[...], outer)
        return self._numbers(self.codes[...].reshape(p, -1, o), scales.reshape(p, -1, o), i).reshape(self.sizes)

    def rows(self, index: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        assert self.dims == 'VD'
        number = index[..., None] * self.blocks + jnp.arange(self.blocks)[None, None]
        scales = self._scales(self.scales[...][index], self.outer[...][number // OUTER])
        codes, i = self.codes[...][index], self.seen[1]
        shape = (index.size, -1, 1)
        return self._numbers(codes.reshape(shape), scales.reshape(shape), i).reshape(*index.shape, i)

    def _scales(self, codes: Array, outer: Float[Array, '...']) -> Float[Array, '...']:
        return jnp.asarray(DYNAMIC)[codes] * outer + self.offset[...]

    def _numbers(self, codes: Array, scales: Float[Array, 'P _ O'], i: int) -> Float[Array, 'P I O']:
        apart = jnp.stack([codes >> 4, codes & 15], axis=2).reshape(codes.shape[0], -1, codes.shape[2])[:, :i]
        return jnp.asarray(BOOKS[self.book])[apart] * jnp.repeat(scales, BLOCK, axis=1)[:, :i]


class EightBit(Matrix):
    """'int8': products are taken with the whole numbers, and scaled after."""

    codes: nnx.Param
    scale: nnx.Param

    def held(self) -> dict[str, str]:
        return {'codes': self.dims, 'scale': self.before + self.behind}

    def encoded(self, kernel: Float[Array, '...']) -> dict[str, Array]:
        kernel, summed = kernel.astype(jnp.float32), self._summed()
        scale = jnp.maximum(jnp.abs(kernel).max(axis=summed), jnp.finfo(jnp.float32).tiny) / 127
        return {'codes': jnp.round(kernel / jnp.expand_dims(scale, summed)).astype(jnp.int8), 'scale': scale}

    def decoded(self) -> Float[Array, '...']:
        return self.codes[...].astype(jnp.float32) * jnp.expand_dims(self.scale[...], self._summed())

    def product(self, spec: str, x: Float[Array, '...']) -> Float[Array, '...']:
        if self.before:
            return super().product(spec, x)
        y = jnp.einsum(spec, x, self.codes[...].astype(x.dtype))
        scale = self.scale[...].astype(x.dtype)
        return y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)

    def rows(self, index: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        return self.codes[...][index].astype(jnp.float32) * self.scale[...][index][..., None]

    def _summed(self) -> tuple[int, ...]:
        return tuple(range(len(self.before), len(self.before) + len(self.summed)))


def quantized(of: nnx.Param, form: Format) -> Matrix:
    """A declared parameter, with or without values, in a format."""
    choose('format', form, dict.fromkeys(get_args(Format)))
    return EightBit(of) if form == 'int8' else FourBit(of, form)


def product(spec: str, x: Float[Array, '...'], kernel: nnx.Param | Matrix) -> Float[Array, '...']:
    """einsum(spec, x, kernel) in x's dtype, whatever holds the kernel."""
    if not isinstance(kernel, Matrix):
        return jnp.einsum(spec, x, kernel[...].astype(x.dtype))
    graph, state = nnx.split(kernel)
    # The backward pass decodes again: nothing of the kernel's size waits for it.
    return jax.checkpoint(lambda x, state: nnx.merge(graph, state).product(spec, x))(x, state)


def normed(x: Float[Array, '...'], scales: Float[Array, '...']) -> Float[Array, '...']:
    """x over its scales, -1 … 1; 0 where they are 0."""
    return jnp.clip(x * (1.0 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)), -1.0, 1.0)

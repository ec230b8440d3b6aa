"""Parameters are declared first and drawn later.

A module's constructor only says what it needs: shape, dims and how to draw it (`param`). The model it builds is
abstract, so a 405B model costs nothing to make and look at. `initialise` then draws every parameter in one
compiled call, each straight onto its own shards. The key of a parameter comes from its path and its layer's
index, never from the order of construction, so equal seeds give bitwise-equal weights on every mesh, scanned or
not.
"""

import dataclasses
import functools
import re
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array, Float, Key
from tpu_llm.parallel.sharding import Layout

Init = Callable[[Key[Array, ''], tuple[int, ...]], Float[Array, '...']]
M = TypeVar('M', bound=nnx.Module)

# The groups of nn/stack.py order a model's layers but do not name its weights.
_GROUP = re.compile(r'\b(prefix|period|suffix)\.\d+\.')


@dataclasses.dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution cut at two standard deviations, with standard deviation `std` after the cut.

    Sixteen random bits choose one of 65,536 equally likely values. Bits and a look-up are exact on every mesh; the
    usual polynomial in floats is not, since how a compiler contracts it depends on the shard's shape.
    """

    std: float

    def __call__(self, key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
        return jnp.asarray(_quantiles())[jax.random.bits(key, shape, 'uint16')] * jnp.float32(self.std)


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    value: float

    def __call__(self, key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
        return jnp.full(shape, self.value, jnp.float32)


@functools.cache
def _quantiles() -> np.ndarray:
    """float32[65536]: the middles of as many equally likely slices of the cut normal, scaled to deviation 1."""
    normal = statistics.NormalDist()
    low = normal.cdf(-2.0)
    lower = np.array([normal.inv_cdf(low + (0.5 - low) * (i + 0.5) / 2**15) for i in range(2**15)])
    values = np.concatenate([lower, -lower[::-1]])
    return (values / values.std()).astype(np.float32)


def param(
    dims: str,
    shape: tuple[int, ...],
    init: Init,
    *,
    summed: str = '',
    padding: int = 0,
    nudge: float = 0.0,
    added: bool = False,
) -> nnx.Param:
    """A declared float32 parameter.

    `summed` names the dims a linear map sums over (Muon asks). The last `padding` entries of the V dim are not
    real: drawn as zeros. With `nudge` the optimizer leaves it alone: each step moves it by that much against the sign
    of its gradient. What is `added` to a model may be missing where its weights are read from: it is drawn then.
    """
    assert len(dims) == len(shape)
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(
        value,
        dims=dims,
        init=init,
        summed=summed,
        padding=padding,
        nudge=nudge,
        added=added,
        layers=(),
        rate=1.0,  # this and the next: models/mup.py
        gain=1.0,
    )


def named_params(model: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """`('stack.period.0.attention.query.kernel', Param)` for every parameter."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield '.'.join(map(str, path)), leaf


def padding_size(leaf: nnx.Param) -> int:
    """How many of a parameter's numbers only pad the vocabulary or the stages."""
    meta = leaf.get_metadata()
    if meta['dims'].startswith('L'):
        return leaf.size // len(meta['layers']) * meta['layers'].count(-1)
    return leaf.size // leaf.shape[meta['dims'].index('V')] * meta['padding'] if meta['padding'] else 0


def count_parameters(model: nnx.Module) -> int:
    """How many numbers the model learns, padding not counted."""
    return sum(leaf.size - padding_size(leaf) for _, leaf in named_params(model))


def initialise(model: M, seed: int, layout: Layout | None = None) -> M:
    """Draws every declared parameter of `model`, in place; with a layout, onto its shards. Returns the model."""
    drawn = draw(dict(named_params(model)), seed, layout)
    flat = [
        (path, leaf.replace(drawn['.'.join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    ]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def draw(leaves: Mapping[str, nnx.Param], seed: int, layout: Layout | None = None) -> dict[str, Array]:
    """The values of declared parameters, in one compiled call; with a layout, onto their shards."""

    def draw_all(key: Key[Array, '']) -> dict[str, Array]:
        return {path: _draw(key, path, leaf) for path, leaf in leaves.items()}

    shardings = {path: param_sharding(layout, path, leaf) for path, leaf in leaves.items()} if layout else None
    return jax.jit(draw_all, out_shardings=shardings)(jax.random.key(seed))


def param_sharding(layout: Layout, path: str, leaf: nnx.Param) -> jax.sharding.NamedSharding:
    return layout.named(layout.rules.params, leaf.get_metadata('dims'), leaf.shape, path)


def _draw(key: Key[Array, ''], path: str, leaf: nnx.Param) -> Float[Array, '...']:
    meta = leaf.get_metadata()
    init, layers, padding = meta['init'], meta['layers'], meta['padding']
    name = _GROUP.sub('', path, count=1) if layers else path
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    stacked = meta['dims'].startswith('L')
    shape = leaf.shape[1:] if stacked else leaf.shape
    dims = meta['dims'][1:] if stacked else meta['dims']

    def draw(key: Key[Array, '']) -> Float[Array, '...']:
        if not padding:
            return init(key, shape)
        real = tuple(size - padding * (letter == 'V') for letter, size in zip(dims, shape, strict=True))
        return jnp.pad(init(key, real), [(0, size - n) for size, n in zip(shape, real, strict=True)])

    if stacked:
        drawn = jax.vmap(lambda layer: draw(jax.random.fold_in(key, layer)))(jnp.asarray(layers))
        real = jnp.asarray(layers) >= 0
        return drawn if -1 not in layers else jnp.where(real.reshape(-1, *[1] * len(shape)), drawn, 0.0)
    return draw(jax.random.fold_in(key, layers[0]) if layers else key)

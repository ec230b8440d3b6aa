"""One matmul a group of rows: rows sorted by expert, each times its own expert's matrix.

`sizes[e]` rows belong to expert e, one group after another; rows past the last group are nobody's and come out as
zeros. How many rows a group has is only known at run time, so a tile of rows may hold several groups: an
implementation visits each (tile, group) pair that overlaps, at most `rows / tile + experts - 1` of them, and masks
the rest of the tile (as MegaBlocks does; Gale et al., 2022, arXiv 2211.15841).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.kernels import device, megablox

TILE = 128  # rows a visit


def grouped_matmul(
    rows: Float[Array, 'M _'],
    kernels: Float[Array, 'E D F'],
    sizes: Int[Array, ' E'],
    *,
    impl: str = 'auto',
    transposed: bool = False,
    expected: int | None = None,
) -> Float[Array, 'M _']:
    """rows[m] @ kernels[expert of row m], in the rows' dtype, summed in float32.

    From [M, D] to [M, F], or transposed the other way. 'auto' is the TPU kernel on TPUs, and plain XLA elsewhere. How
    many rows are `expected` to be someone's, all if None, tells the kernel how to cut them.
    """
    return IMPLS[impl](rows, kernels, sizes, transposed, rows.shape[0] if expected is None else expected)


def visits(sizes: Int[Array, ' E'], rows: int, tile: int) -> tuple[Int[Array, ' V'], Int[Array, ' V'], Int[Array, '']]:
    """The (tile, group) pairs that overlap, in order, and how many of the V = rows / tile + E - 1 places are used."""
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first, last = starts // tile, (ends + tile - 1) // tile
    tiles = jnp.where(sizes > 0, last - first, 0)
    total = tiles.sum()
    length = -(-rows // tile) + sizes.shape[0] - 1
    group = jnp.repeat(jnp.arange(sizes.shape[0]), tiles, total_repeat_length=length)
    before = jnp.cumsum(tiles) - tiles
    return first[group] + jnp.arange(length) - before[group], group, total


def ragged(
    rows: Array, kernels: Float[Array, 'E D F'], sizes: Int[Array, ' E'], transposed: bool, expected: int
) -> Array:
    """XLA's own. On a CPU and in the backward pass on a TPU it computes every row for every expert."""
    kernels = kernels.swapaxes(1, 2) if transposed else kernels
    return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def tiles(
    rows: Array, kernels: Float[Array, 'E D F'], sizes: Int[Array, ' E'], transposed: bool, expected: int
) -> Array:
    """A loop over visits in plain XLA: computes what is needed and at most `experts - 1` tiles more."""
    return _rows_by_kernels(rows, kernels, sizes, transposed)


def _forward(
    rows: Array, kernels: Array, sizes: Array, transposed: bool, expected: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return tiles(rows, kernels, sizes, transposed, expected), (rows, kernels, sizes)


def _backward(
    transposed: bool, expected: int, saved: tuple[Array, Array, Array], d_out: Array
) -> tuple[Array, Array, None]:
    rows, kernels, sizes = saved
    d_rows = _rows_by_kernels(d_out, kernels, sizes, not transposed)
    left, right = (d_out, rows) if transposed else (rows, d_out)
    return d_rows, _rows_by_rows(left, right, sizes).astype(kernels.dtype), None


tiles.defvjp(_forward, _backward)


def _rows_by_kernels(rows: Array, kernels: Array, sizes: Array, transposed: bool) -> Array:
    spec, width = ('MF,DF->MD', kernels.shape[1]) if transposed else ('MD,DF->MF', kernels.shape[2])

    def visit(out: Array, tile: Array, group: Array, mine: Array, start: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        product = jnp.einsum(spec, tile, kernel, preferred_element_type=jnp.float32).astype(out.dtype)
        before = jax.lax.dynamic_slice_in_dim(out, start, TILE)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product, before), start, 0)

    padded = _padded(rows)
    out = _loop(visit, jnp.zeros((padded.shape[0], width), rows.dtype), padded, sizes)
    return out[: rows.shape[0]]


def _rows_by_rows(rows: Array, others: Array, sizes: Array) -> Array:
    """For each group the sum over its rows of row ⊗ other: float32[E, D, F]."""
    padded = _padded(others)

    def visit(out: Array, tile: Array, group: Array, mine: Array, start: Array) -> Array:
        other = jax.lax.dynamic_slice_in_dim(padded, start, TILE)
        product = jnp.einsum('MD,MF->DF', jnp.where(mine, tile, 0), other, preferred_element_type=jnp.float32)
        return out.at[group].add(product)

    zeros = jnp.zeros((sizes.shape[0], rows.shape[1], others.shape[1]), jnp.float32)
    return _loop(visit, zeros, _padded(rows), sizes)


def _loop(visit: Callable[..., Array], out: Array, rows: Array, sizes: Array) -> Array:
    tile_of, group_of, total = visits(sizes, rows.shape[0], TILE)
    ends = jnp.cumsum(sizes)
    places = jnp.arange(TILE)

    def body(i: Array, out: Array) -> Array:
        start, group = tile_of[i] * TILE, group_of[i]
        row = start + places
        mine = (row >= ends[group] - sizes[group]) & (row < ends[group])
        return visit(out, jax.lax.dynamic_slice_in_dim(rows, start, TILE), group, mine[:, None], start)

    return jax.lax.fori_loop(0, total, body, out)


def _padded(rows: Array) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % TILE), (0, 0)))


def auto(
    rows: Array, kernels: Float[Array, 'E D F'], sizes: Int[Array, ' E'], transposed: bool, expected: int
) -> Array:
    return (megablox.matmul if device.on_tpu() else tiles)(rows, kernels, sizes, transposed, expected)


IMPLS: dict[str, Callable[[Any, Any, Any, bool, int], Any]] = {
    'auto': auto,
    'megablox': megablox.matmul,
    'tiles': tiles,
    'ragged': ragged,
}

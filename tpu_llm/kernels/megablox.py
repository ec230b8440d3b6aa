"""The grouped matmul as a TPU kernel: MegaBlocks' (Gale et al., 2022, arXiv 2211.15841), which JAX ships as megablox.

The kernel visits the tiles of rows that a group overlaps, and what it executes beyond what is needed are the rows of
other groups in those tiles. Tiles are chosen so that this stays small, forward and backward.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.kernels import device

# Chips that compute the most for what they read need larger tiles; only their compilers have room for them.
_LARGE = ('TPU v6 lite', 'TPU7x')


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(
    rows: Array, kernels: Float[Array, 'E D F'], sizes: Int[Array, ' E'], transposed: bool, expected: int
) -> Array:
    """rows[m] @ kernels[expert of row m], [M, D] to [M, F] or transposed; off TPU, the same kernel interpreted."""
    return _by_kernels(rows, kernels, sizes, transposed, expected)


def _forward(
    rows: Array, kernels: Array, sizes: Array, transposed: bool, expected: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return matmul(rows, kernels, sizes, transposed, expected), (rows, kernels, sizes)


def _backward(
    transposed: bool, expected: int, saved: tuple[Array, Array, Array], d_out: Array
) -> tuple[Array, Array, None]:
    rows, kernels, sizes = saved
    left, right = (d_out, rows) if transposed else (rows, d_out)
    d_rows = _by_kernels(d_out, kernels, sizes, not transposed, expected)
    return d_rows, _by_rows(left, right, kernels, sizes, expected), None


matmul.defvjp(_forward, _backward)


def _by_kernels(rows: Array, kernels: Array, sizes: Array, transposed: bool, expected: int) -> Float[Array, 'M _']:
    tile = row_tile(expected, sizes.shape[0])
    deep, wide = rows.shape[1], kernels.shape[1 if transposed else 2]
    out = gmm(
        _padded(rows, tile),
        kernels,
        sizes,
        rows.dtype,
        # Memory is read 1 / tile + 1 / (columns a tile) times for each sum, however deep the tiles are.
        (tile, side(deep, 512), side(wide, 2048 // _scale(rows))),
        transpose_rhs=transposed,
        interpret=not device.on_tpu(),
    )[: rows.shape[0]]
    # The kernel leaves unwritten what is nobody's.
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], out, 0)


def _by_rows(rows: Array, others: Array, kernels: Array, sizes: Array, expected: int) -> Float[Array, 'E D F']:
    """For each group the sum over its rows of row ⊗ other."""
    tile = min(row_tile(expected, sizes.shape[0]), 512)
    deep, wide = 1024 // _scale(rows), (2048 if _large() else 1024) // _scale(rows)
    return tgmm(
        _padded(rows, tile).T,
        _padded(others, tile),
        sizes,
        kernels.dtype,
        (tile, side(rows.shape[1], deep), side(others.shape[1], wide)),
        interpret=not device.on_tpu(),
    )


def row_tile(expected: int, groups: int) -> int:
    """Rows a tile: as many as leave what is executed within 1.15 times what is needed, but at least 128.

    Every group may end inside of a tile, which is then visited once more. A tile is read while the one before it is
    computed: it takes some 500 rows, or 1000 on the fastest chips, for that to be the longer of the two. Fewer than 128
    take a matrix unit as long as 128.
    """
    tiles = (1024, 512, 256) if _large() else (512, 256)
    return next((tile for tile in tiles if groups * tile <= 0.15 * expected), 128)


def _large() -> bool:
    return device.traced_for().device_kind in _LARGE


def side(size: int, most: int) -> int:
    """How much of a dim of that size a tile has: what fills it up best, and of those the largest up to `most`."""
    sides = [size] if size <= most else range(128, most + 1, 128)
    return min(sides, key=lambda side: (math.ceil(size / side) * side, -side))


def _padded(rows: Array, tile: int) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))


def _scale(rows: Array) -> int:
    """Tiles of float32 numbers have half the columns."""
    return rows.dtype.itemsize // 2

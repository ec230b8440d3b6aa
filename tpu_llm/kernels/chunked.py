"""Losses of logits, a few positions at a time: float32 [B, T, V] never exists.

The forward pass already knows the gradient of its logits, so it computes the gradients of `hidden` and `kernel`
chunk by chunk while the logits are at hand, and the backward pass only scales them: each logit is computed once.

Every device does its own positions with its own part of the vocabulary: no logits, hidden states or gradients of a
chunk travel.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int
from tpu_llm.parallel import sharding

Split = tuple[str, ...]  # the mesh axes over which the vocabulary is split


class OfChunk(Protocol):
    """What a loss is of one chunk: sums, of which the first has a gradient, and that gradient by the raw logits.

    `rows` belong to the chunk's positions, `columns` to the vocabulary; where that is split over the mesh axes `split`,
    kernel, bias, columns and logits are this device's part.
    """

    def __call__(
        self,
        hidden: Float[Array, 'B T D'],
        kernel: Float[Array, 'D V'],
        bias: Float[Array, ' V'] | None,
        rows: Sequence[Array],
        columns: Sequence[Array | None],
        split: Split,
    ) -> tuple[tuple[Float[Array, ''], ...], Float[Array, 'B T V']]: ...


def sums_of_logits(
    of_chunk: OfChunk,
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    bias: Float[Array, ' V'] | None,
    rows: Sequence[AnyArray],
    columns: Sequence[Array | None] = (),
    *,
    chunk: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, ''], ...]:
    """The sums over all positions, float32; gradients of the first flow to `hidden`, `kernel` and `bias`.

    `rows` are arrays [B, T, …], `columns` […, V]; zeros in all of `rows` must add nothing. Matmuls are in `dtype` with
    float32 results, to which a bias is added. `chunk` positions of a device are done at a time (0: chosen by memory).
    """
    return _sums(hidden, kernel, bias, tuple(rows), tuple(columns), of_chunk, chunk, dtype)


def _plain(hidden, kernel, bias, rows, columns, of_chunk, chunk, dtype):
    def body(hidden, kernel, bias, rows, columns, summed):
        def found(x):
            return of_chunk(x[0], kernel, bias, x[1:], columns, summed.columns)[0]

        chunks = split_rows((hidden, *rows), chunk, kernel.shape[1])
        sums, _ = jax.lax.scan(lambda s, x: (jax.tree.map(jnp.add, s, found(x)), None), _start(found, chunks), chunks)
        return (jax.lax.psum(sums, summed.rows),)

    return _by_shard(body, hidden, kernel, bias, rows, columns, dtype, gradients=False)[0]


def _forward(hidden, kernel, bias, rows, columns, of_chunk, chunk, dtype):
    def body(hidden, kernel, bias, rows, columns, summed):
        def found(x):
            return of_chunk(x[0], kernel, bias, x[1:], columns, summed.columns)

        def one(carry, x):
            sums, d_logits = found(x)
            d_bias = None if bias is None else carry[2] + d_logits.sum(axis=(0, 1))
            d_logits = d_logits.astype(dtype)
            d_hidden = jnp.einsum('BTV,DV->BTD', d_logits, kernel, preferred_element_type=jnp.float32)
            d_kernel = jnp.einsum('BTD,BTV->DV', x[0], d_logits, preferred_element_type=jnp.float32)
            return (jax.tree.map(jnp.add, carry[0], sums), carry[1] + d_kernel, d_bias), d_hidden.astype(dtype)

        chunks = split_rows((hidden, *rows), chunk, kernel.shape[1])
        start = (
            _start(lambda x: found(x)[0], chunks),
            jnp.zeros(kernel.shape, jnp.float32),
            None if bias is None else jnp.zeros_like(bias),
        )
        (sums, d_kernel, d_bias), d_hidden = jax.lax.scan(one, start, chunks)
        d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
        # Over the devices once, after all chunks, in the dtype in which the gradients of other weights are summed.
        sums, d_kernel, d_bias = jax.lax.psum((sums, d_kernel.astype(dtype), d_bias), summed.rows)
        return sums, jax.lax.psum(d_hidden, summed.columns), d_kernel, d_bias

    sums, d_hidden, d_kernel, d_bias = _by_shard(body, hidden, kernel, bias, rows, columns, dtype, gradients=True)
    layout = sharding.current()
    if layout is not None and layout.mesh.size > 1:
        # Split now, not after the backward pass of the layers: until then it would lie whole on every device.
        d_kernel = sharding.constrain(d_kernel, 'DV', layout.rules.gradients)
        d_hidden, d_kernel = jax.lax.optimization_barrier((d_hidden, d_kernel))
    return sums, (d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), d_bias)


def _backward(of_chunk, chunk, dtype, gradients, cotangents):
    scale = cotangents[0]
    d_hidden, d_kernel, d_bias = gradients
    return scale * d_hidden, scale * d_kernel, None if d_bias is None else scale * d_bias, None, None


_sums = jax.custom_vjp(_plain, nondiff_argnums=(5, 6, 7))
_sums.defvjp(_forward, _backward)


def _start(found, chunks):
    """Sums of nothing."""
    shapes = jax.eval_shape(found, [x[0] for x in chunks])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Summed:
    """The mesh axes over which sums go: those that split positions, and those that split the vocabulary."""

    rows: tuple[str, ...] = ()
    columns: Split = ()


def _by_shard(body, hidden, kernel, bias, rows, columns, dtype, *, gradients: bool):
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    layout = sharding.current()
    if layout is None or layout.mesh.size == 1:
        return body(hidden, kernel, bias, rows, columns, _Summed())
    batch, length, vocab = layout.spec('BTV')
    positions, matrix, entries = PartitionSpec(batch, length), PartitionSpec(None, vocab), PartitionSpec(vocab)
    summed = _Summed(sharding.axis_names(batch) + sharding.axis_names(length), sharding.axis_names(vocab))
    others = tuple(PartitionSpec() if x is None else PartitionSpec(*[None] * (x.ndim - 1), vocab) for x in columns)
    results = (PartitionSpec(), positions, matrix, entries)
    return sharding.manual(
        lambda *args: body(*args, summed),
        layout,
        in_specs=(positions, matrix, entries, (positions,) * len(rows), others),
        out_specs=results if gradients else results[:1],
    )(hidden, kernel, bias, rows, columns)


def split_rows(arrays: Sequence[AnyArray], chunk: int, vocab: int) -> list[Array]:
    """[B, T, …] → [T / chunk, B, chunk, …], the first of them hidden states.

    What the last chunk lacks is zeros: of weight 0, it adds neither loss nor gradient.
    """
    rows, length = arrays[0].shape[:2]
    chunk = min(chunk or _auto_chunk(rows, length, vocab), length)
    count = math.ceil(length / chunk)

    def split(x: AnyArray) -> Array:
        x = jnp.asarray(x)
        if count * chunk > length:
            x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    return [split(x) for x in arrays]


def _auto_chunk(rows: int, length: int, vocab: int) -> int:
    """As many positions as one device's logits stay within a budget for that its caches like.

    A divisor of `length` needs no padding; where there is none near, chunks are as equal as they can be.
    """
    layout = sharding.current()
    budget = 2**22 if (layout.platform if layout else jax.default_backend()) == 'cpu' else 2**25
    fits = min(max(1, budget // (rows * vocab)), length)
    divisor = max(n for n in range(1, fits + 1) if length % n == 0)
    return divisor if 2 * divisor >= fits else math.ceil(length / math.ceil(length / fits))


def logits_of_chunk(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    bias: Float[Array, ' V'] | None,
    vocab_size: int,
    softcap: float,
    split: Split,
) -> tuple[Float[Array, 'B T V'], Int[Array, '1 1 V'], Bool[Array, '1 1 V'] | None]:
    """float32 logits, which token each column is, and which columns are not padding: None where none is."""
    logits = jnp.einsum('BTD,DV->BTV', hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None, None]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    width = kernel.shape[1]
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, width), 2) + jax.lax.axis_index(split) * width
    return logits, columns, columns < vocab_size if width * jax.lax.axis_size(split) > vocab_size else None

"""Attention block by block in plain XLA: scores exist for one block of queries and keys at a time.

The softmax is summed online in float32 and its backward pass computes the scores again (Rabe and Staats, 2021, arXiv
2112.05682; FlashAttention: Dao et al., 2022, arXiv 2205.14135). A block in which no query sees a key is skipped.

`forward` and `backward` attend to *some* keys: results over several sets of keys merge by their log-sums, which is what
`kernels/ring.py` does. Heads lie outermost; inside, G = N / K query heads to each of the K key-value heads.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.kernels.mask import Mask

UNSEEN = float(jnp.finfo(jnp.float32).min)  # the score of a key that is not seen
_LATEST = jnp.iinfo(jnp.int32).max

Rows = tuple[Int[Array, '...'], Int[Array, '...']]  # segments and positions, of one block or of all


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Scores are query · key * scale, then, with a soft-cap c > 0, c * tanh(score / c)."""

    scale: float
    softcap: float = 0.0
    block: int = 512  # at most so many queries or keys at a time


def forward(
    query: Float[Array, 'B N T H'],
    key: Float[Array, 'B K S H'],
    value: Float[Array, 'B K S H'],
    mask: Mask,
    options: Options,
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B N T']]:
    """The attended values and the log of the sum of exp(score), float32: UNSEEN where nothing is seen.

    Queries are scaled already.
    """
    rows, columns = _sides(mask, options)
    keys, values = _cut(key, 2, options), _cut(value, 2, options)

    def queries(_: None, scanned: tuple[Array, Rows, Array]) -> tuple[None, tuple[Array, Array]]:
        q, row, wanted = scanned

        def visit(sums: tuple[Array, ...], scanned: tuple[Array, Array, Rows, Array]) -> tuple[tuple[Array, ...], None]:
            k, v, column, wanted = scanned

            def see(sums: tuple[Array, ...]) -> tuple[Array, ...]:
                return _accumulate(sums, q, k, v, _allowed(mask, row, column), options)

            return jax.lax.cond(wanted, see, lambda sums: sums, sums), None

        start = jnp.full(q.shape[:-1], UNSEEN), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
        (top, total, out), _ = jax.lax.scan(visit, start, (keys, values, columns, wanted))
        some = jnp.where(total > 0, total, 1.0)
        return None, (out / some[..., None], jnp.where(total > 0, top + jnp.log(some), UNSEEN))

    scanned = _cut(_grouped(query, key), 3, options), rows, visible(mask, options)
    _, (out, log_sum) = jax.lax.scan(queries, None, scanned)
    out, log_sum = (_join(x, 3, query.shape[2]) for x in (out, log_sum))
    return out.reshape(query.shape), log_sum.reshape(query.shape[:-1])


def backward(
    query: Float[Array, 'B N T H'],
    key: Float[Array, 'B K S H'],
    value: Float[Array, 'B K S H'],
    mask: Mask,
    log_sum: Float[Array, 'B N T'],
    delta: Float[Array, 'B N T'],
    d_out: Float[Array, 'B N T H'],
    options: Options,
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B K S H'], Float[Array, 'B K S H']]:
    """What these keys add to the gradient of the queries, and the gradients of keys and values, float32.

    `log_sum` and `delta`, the sum of out * d_out over H, are those over all the keys that the queries see.
    """
    rows, columns = _sides(mask, options)
    per_query = [_cut(_grouped(x, key), 3, options) for x in (query, log_sum, delta, d_out)]

    def keys(d_queries: Array, scanned: tuple[Array, Array, Rows, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, v, column, wanted = scanned

        def visit(d_kv: tuple[Array, Array], scanned: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
            q, log_sum, delta, d_out, row, d_q, wanted = scanned

            def see(sums: tuple[Array, ...]) -> tuple[Array, ...]:
                allowed = _allowed(mask, row, column)
                return _gradients(sums, q, k, v, allowed, log_sum, delta, d_out, options)

            d_q, d_k, d_v = jax.lax.cond(wanted, see, lambda sums: sums, (d_q, *d_kv))
            return (d_k, d_v), d_q

        zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
        d_kv, d_queries = jax.lax.scan(visit, zeros, (*per_query, rows, d_queries, wanted))
        return d_queries, d_kv

    scanned = _cut(key, 2, options), _cut(value, 2, options), columns, visible(mask, options).T
    d_query, (d_key, d_value) = jax.lax.scan(keys, jnp.zeros(per_query[0].shape), scanned)
    d_query = _join(d_query, 3, query.shape[2]).reshape(query.shape)
    return d_query, _join(d_key, 2, key.shape[2]), _join(d_value, 2, key.shape[2])


# ------------------------------------------------------------------------------------------------ one block


def _grouped(x: Float[Array, 'B N *T'], key: Float[Array, 'B K S H']) -> Float[Array, 'B K G *T']:
    return x.reshape(x.shape[0], key.shape[1], -1, *x.shape[2:])


def _scores(q: Array, k: Array, options: Options) -> Float[Array, 'B K G T S']:
    scores = jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
    return options.softcap * jnp.tanh(scores / options.softcap) if options.softcap else scores


def _accumulate(
    sums: tuple[Array, ...], q: Array, k: Array, v: Array, allowed: Bool[Array, 'B 1 1 T S'], options: Options
) -> tuple[Array, ...]:
    """The highest score, the sum of weights and the weighted values so far, with one more block of keys."""
    top, total, out = sums
    scores = jnp.where(allowed, _scores(q, k, options), UNSEEN)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    shrink = jnp.exp(top - new_top)
    weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
    values = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new_top, shrink * total + weights.sum(axis=-1), shrink[..., None] * out + values


def _gradients(
    sums: tuple[Array, ...],
    q: Array,
    k: Array,
    v: Array,
    allowed: Bool[Array, 'B 1 1 T S'],
    log_sum: Array,
    delta: Array,
    d_out: Array,
    options: Options,
) -> tuple[Array, ...]:
    """The gradients of q, k and v so far, with this block's."""
    scores = _scores(q, k, options)
    weights = jnp.where(allowed, jnp.exp(scores - log_sum[..., None]), 0.0)
    d_weights = jnp.einsum('BKGTH,BKSH->BKGTS', d_out, v, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - delta[..., None])
    if options.softcap:
        d_scores = d_scores * (1.0 - jnp.square(scores / options.softcap))
    weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
    d_q = jnp.einsum('BKGTS,BKSH->BKGTH', d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum('BKGTS,BKGTH->BKSH', d_scores, q, preferred_element_type=jnp.float32)
    d_v = jnp.einsum('BKGTS,BKGTH->BKSH', weights, d_out, preferred_element_type=jnp.float32)
    return sums[0] + d_q, sums[1] + d_k, sums[2] + d_v


def _allowed(mask: Mask, row: tuple[Array, Array], column: tuple[Array, Array]) -> Bool[Array, 'B 1 1 T S']:
    pair = dataclasses.replace(
        mask, query_segments=row[0], query_positions=row[1], key_segments=column[0], key_positions=column[1]
    )
    return pair.allowed()[:, None, None]


# ------------------------------------------------------------------------------------ blocks, and what they see


def visible(mask: Mask, options: Options) -> Bool[Array, 'T_blocks S_blocks']:
    """Where a query may see a key: false only if it is certain for every row that none does.

    A row's tokens are ordered by (segment, position), and so are blocks, by their first and last tokens. No key is seen
    in a block that begins after the queries end or that ends `window` before they begin. Padding comes last.
    """
    rows, columns = _sides(mask, options)
    first_query, last_query = (_end(rows, last)[:, :, None] for last in (False, True))
    first_key, last_key = (_end(columns, last)[:, None, :] for last in (False, True))
    unseen = _beyond(first_key, last_query, 1 if mask.causal else mask.window)
    unseen |= _beyond(first_query, last_key, mask.window)
    return ~unseen.all(axis=-1)


def _end(rows: Rows, last: bool) -> Int[Array, '2 blocks B']:
    """The (segment, position) of each block's last token, or of its first."""
    segments, positions = jnp.where(rows[0] > 0, rows[0], _LATEST), rows[1]
    if last:
        segment = segments.max(axis=-1)
        position = jnp.where(segments == segment[..., None], positions, 0).max(axis=-1)
    else:
        segment = segments.min(axis=-1)
        position = jnp.where(segments == segment[..., None], positions, _LATEST).min(axis=-1)
    return jnp.stack([segment, position])


def _beyond(later: Int[Array, '2 ...'], earlier: Int[Array, '2 ...'], limit: int) -> Bool[Array, '...']:
    """Whether one token lies in a later segment than the other or, with a limit, that many positions after it."""
    beyond = later[0] > earlier[0]
    if limit:
        beyond |= (later[0] == earlier[0]) & (later[1] - earlier[1] >= limit)
    return beyond


def _sides(mask: Mask, options: Options) -> tuple[Rows, Rows]:
    """Queries' and keys' segments and positions in blocks; what fills the last block is in no segment."""
    queries = _cut(mask.query_segments, 1, options, fill=-1), _cut(mask.query_positions, 1, options)
    keys = _cut(mask.key_segments, 1, options, fill=-1), _cut(mask.key_positions, 1, options)
    return queries, keys


def _cut(x: Array, axis: int, options: Options, fill: int = 0) -> Array:
    """[…, T, …] → [blocks, …, T / blocks, …]; what the last block lacks is `fill`.

    Their number is even, so that a row's two pieces in zig-zag order lie in different blocks.
    """
    length = x.shape[axis]
    count = 2 * math.ceil(length / (2 * options.block))
    size = math.ceil(length / count)
    if count * size > length:
        missing = [(0, count * size - length) if i == axis else (0, 0) for i in range(x.ndim)]
        x = jnp.pad(x, missing, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)

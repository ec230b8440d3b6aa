"""How far a student's next-token distributions are from a teacher's, in chunks (`chunked`); the student learns.

With p the teacher's and q the student's probabilities, softmax(logits / temperature):

    forward          KL(p ‖ q): q covers all that p says                    (Hinton et al., 2015, arXiv 1503.02531)
    reverse          KL(q ‖ p): q says only what p would                    (Gu et al., 2023, arXiv 2306.08543)
    jensen_shannon   β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q   (Agarwal et al., 2023, arXiv 2306.13649)

The last over β tends to the forward one as β → 0, over 1 − β to the reverse one as β → 1. All are times temperature²,
so that gradients stay as large as they are at 1.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import AnyArray, Array, Float, Int
from tpu_llm.kernels.chunked import Split, logits_of_chunk, sums_of_logits

Kind = Literal['forward', 'reverse', 'jensen_shannon']


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The loss of one position is temperature² * divergence + `labels` * (−log q of the target, at temperature 1)."""

    kind: Kind
    vocab_size: int
    beta: float = 0.5
    temperature: float = 1.0
    labels: float = 0.0
    softcap: float = 0.0
    teacher_softcap: float = 0.0
    chunk: int = 0  # as cross_entropy's


class Head(NamedTuple):
    """Hidden states and what makes logits of them."""

    hidden: Float[Array, 'B T D']
    kernel: Float[Array, 'D V']
    bias: Float[Array, ' V'] | None
    dtype: jnp.dtype  # of the matmul


@jax.named_scope('loss')
def divergence(
    student: Head,
    teacher: Head,
    targets: Int[AnyArray, 'B T'],
    weights: Float[AnyArray, 'B T'],
    options: Options,
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, '']]:
    """Weighted sums, float32: the loss, the divergence itself (nats), −log q of the targets.

    Only the loss has a gradient, and only of the student's arrays. V is the same for both.
    """
    assert student.kernel.shape[1] == teacher.kernel.shape[1]
    loss, apart, nll = sums_of_logits(
        functools.partial(_from_heads, options),
        *student[:3],
        (targets, weights, teacher.hidden.astype(teacher.dtype)),
        (teacher.kernel.astype(teacher.dtype), teacher.bias),
        chunk=options.chunk,
        dtype=student.dtype,
    )
    return loss, *jax.lax.stop_gradient((apart, nll))


class Likely(NamedTuple):
    """What is kept of a teacher's distributions: its likeliest tokens, and all others as one."""

    tokens: Int[AnyArray, 'B T X']  # each once
    log_probs: Float[AnyArray, 'B T X']  # natural, at temperature 1
    rest: Float[AnyArray, 'B T']  # log of the probability of all others together


@jax.named_scope('loss')
def likely_divergence(
    student: Head,
    teacher: Likely,
    targets: Int[AnyArray, 'B T'],
    weights: Float[AnyArray, 'B T'],
    options: Options,
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, '']]:
    """As `divergence`, between distributions over the X likeliest tokens and the rest, which is one outcome.

    Never more than `divergence`. The teacher's probabilities are scaled to add up to 1; X is below `vocab_size`, and
    the temperature is 1.
    """
    assert options.temperature == 1.0
    assert teacher.tokens.shape[-1] < options.vocab_size
    loss, apart, nll = sums_of_logits(
        functools.partial(_from_likely, options),
        *student[:3],
        (targets, weights, *teacher),
        chunk=options.chunk,
        dtype=student.dtype,
    )
    return loss, *jax.lax.stop_gradient((apart, nll))


def _from_likely(options: Options, hidden, kernel, bias, rows, columns, split):
    targets, weights, likely, log_probs, rest = rows
    logits, tokens, real = logits_of_chunk(hidden, kernel, bias, options.vocab_size, options.softcap, split)
    log_q = log_softmax(logits, real, split)
    # Of the likeliest tokens, those in this device's columns.
    column = likely - tokens[:, :, :1]
    here = (column >= 0) & (column < tokens.shape[2])
    column = jnp.clip(column, 0, tokens.shape[2] - 1)
    row, position = (jax.lax.broadcasted_iota(jnp.int32, likely.shape, axis) for axis in (0, 1))
    at = (row, position, column)
    known = jnp.zeros(logits.shape, bool).at[at].max(here)
    others = jnp.where(known if real is None else known | ~real, -jnp.inf, log_q)
    top = jax.lax.pmax(others.max(axis=-1), split)
    log_others = top + jnp.log(jax.lax.psum(jnp.exp(others - top[..., None]).sum(axis=-1), split))
    found = jax.lax.psum(jnp.where(here, log_q[at], 0.0), split)
    log_p = jax.nn.log_softmax(jnp.concatenate([log_probs, rest[..., None]], axis=-1))
    apart, d_apart = _between(options, log_p, jnp.concatenate([found, log_others[..., None]], axis=-1), None, ())
    # What goes to the rest is shared by its tokens as they have it.
    d_logits = d_apart[..., -1:] * jnp.exp(others - log_others[..., None])
    d_logits = d_logits.at[at].add(jnp.where(here, d_apart[..., :-1], 0.0))
    return _sums(options, apart, d_logits, logits, log_q, tokens == targets[..., None], real, weights, split)


def _from_heads(options: Options, hidden, kernel, bias, rows, columns, split):
    (targets, weights, seen), (their_kernel, their_bias) = rows, columns
    size, warm = options.vocab_size, options.temperature
    theirs, _, _ = logits_of_chunk(seen, their_kernel, their_bias, size, options.teacher_softcap, split)
    logits, tokens, real = logits_of_chunk(hidden, kernel, bias, size, options.softcap, split)
    log_p, log_q = (log_softmax(x / warm, real, split) for x in (theirs, logits))
    apart, d_apart = _between(options, log_p, log_q, real, split)
    log_1 = log_q if warm == 1.0 else log_softmax(logits, real, split)
    return _sums(options, apart, d_apart, logits, log_1, tokens == targets[..., None], real, weights, split)


def _sums(options: Options, apart, d_apart, logits, log_q, hit, real, weights, split):
    """Of a chunk, with the labels; `log_q` is at temperature 1, `d_apart` by the logits over temperature."""
    nll = -jax.lax.psum(jnp.where(hit, log_q, 0.0).sum(axis=-1), split)
    # The logits are divided by the temperature: one of its two powers goes.
    d_logits = options.temperature * d_apart
    if options.labels:
        d_logits = d_logits + options.labels * (_exp(log_q, real) - hit)
    if options.softcap:
        d_logits = d_logits * (1.0 - (logits / options.softcap) ** 2)
    weighted = weights.astype(jnp.float32)
    loss = options.temperature**2 * apart + options.labels * nll
    return tuple((x * weighted).sum() for x in (loss, apart, nll)), d_logits * weighted[..., None]


def _between(options: Options, log_p, log_q, real, split: Split) -> tuple[Array, Array]:
    """The divergence, float32[B, T], and its gradient by the student's logits over temperature, [B, T, V]."""

    def mean(probs, of):
        return jax.lax.psum((probs * of).sum(axis=-1), split)

    p, q = _exp(log_p, real), _exp(log_q, real)
    if options.kind == 'forward':
        return mean(p, log_p - log_q), q - p
    if options.kind == 'reverse':
        apart = mean(q, log_q - log_p)
        return apart, q * (log_q - log_p - apart[..., None])
    share = options.beta
    log_m = jnp.logaddexp(log_p + np.log(share), log_q + np.log1p(-share))
    ours = mean(q, log_q - log_m)
    apart = share * mean(p, log_p - log_m) + (1 - share) * ours
    return apart, (1 - share) * q * (log_q - log_m - ours[..., None])


def log_softmax(logits, real, split: Split) -> Array:
    """float32[B, T, V], over this device's columns of a vocabulary split over `split`; finite in padding, too."""
    shown = logits if real is None else jnp.where(real, logits, -jnp.inf)
    top = jax.lax.pmax(shown.max(axis=-1, keepdims=True), split)
    return logits - top - jnp.log(jax.lax.psum(jnp.exp(shown - top).sum(axis=-1, keepdims=True), split))


def _exp(log_probs, real) -> Array:
    return jnp.exp(log_probs) if real is None else jnp.where(real, jnp.exp(log_probs), 0.0)

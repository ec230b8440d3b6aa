"""Losses that are sums over tokens of some function of log p: each logit is computed once (`chunked`).

For such a loss the slope by each log p is known as soon as that log p is, and with it the gradient of the logits. A
loss in which tokens meet before they are summed, as in a ratio of whole sequences, takes `token_log_probs`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tpu_llm.arrays import AnyArray, Array, Float, Int
from tpu_llm.kernels import cross_entropy
from tpu_llm.kernels.chunked import Split, sums_of_logits
from tpu_llm.kernels.cross_entropy import Options

OfTokens = Callable[..., tuple[Array, ...]]


@jax.named_scope('loss')
def token_losses(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    rows: Sequence[Float[AnyArray, 'B T']],
    of_tokens: OfTokens,
    options: Options,
    dtype: jnp.dtype,
    bias: Float[Array, ' V'] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, ''], ...]:
    """The sums of what `of_tokens(log_probs, *rows)` gives for each token, float32; gradients of the first flow to
    `hidden`, `kernel` and `bias`.

    log_probs are of the targets under softmax(logits / temperature). What `of_tokens` gives must be 0, and so must its
    slope, where all of `rows` are. Of the options it reads `vocab_size`, `softcap` and `chunk`.
    """
    hidden, bias = cross_entropy.cooled(hidden, bias, temperature, options)
    of_chunk = functools.partial(_chunk, of_tokens, options)
    return sums_of_logits(of_chunk, hidden, kernel, bias, (targets, *rows), chunk=options.chunk, dtype=dtype)


def _chunk(of_tokens: OfTokens, options: Options, hidden, kernel, bias, rows, columns, split: Split):
    targets, *others = rows

    def summed(log_probs: Array) -> tuple[Array, tuple[Array, ...]]:
        sums = tuple(each.sum() for each in of_tokens(log_probs, *others))
        return sums[0], sums

    log_probs, by_logits = cross_entropy.log_probs_and_slope(hidden, kernel, bias, targets, options, split)
    slope, sums = jax.grad(summed, has_aux=True)(log_probs)
    return sums, by_logits(slope)

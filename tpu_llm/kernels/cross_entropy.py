"""The next-token loss, from hidden states and the unembedding, in chunks (`chunked`)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int
from tpu_llm.kernels.chunked import Split, logits_of_chunk, sums_of_logits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The loss of one position is (1 - s) * nll + s * mean over V of nll + z_loss * log(Z)².

    s is `label_smoothing` (Szegedy et al., 2015); z_loss keeps the normaliser near 1 (PaLM, §5: 1e-4). Columns
    from `vocab_size` on are padding. `chunk` positions of a device are done at a time, at the end perhaps fewer
    (0: chosen by memory).
    """

    vocab_size: int
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int = 0
    judged: bool = False  # whether the likeliest token is asked for, too


@jax.named_scope('loss')
def cross_entropy(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    weights: Float[AnyArray, 'B T'],
    options: Options,
    dtype: jnp.dtype,
    bias: Float[Array, ' V'] | None = None,
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """(weighted sum of the losses, weighted sum of plain −log p), float32; only the first has a gradient.

    Matmuls are in `dtype` with float32 results, to which a bias is added. Gradients flow to `hidden`, `kernel` and
    `bias`.
    """
    loss, nll = _sums(hidden, kernel, targets, weights, options, dtype, bias)
    return loss, jax.lax.stop_gradient(nll)


@jax.named_scope('loss')
def judged_cross_entropy(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    weights: Float[AnyArray, 'B T'],
    options: Options,
    dtype: jnp.dtype,
    bias: Float[Array, ' V'] | None = None,
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, '']]:
    """`cross_entropy`, and the sum of the weights of positions whose target no other token is likelier than."""
    options = dataclasses.replace(options, judged=True)
    loss, nll, right = _sums(hidden, kernel, targets, weights, options, dtype, bias)
    return loss, *jax.lax.stop_gradient((nll, right))


def _sums(hidden, kernel, targets, weights, options: Options, dtype, bias) -> tuple[Array, ...]:
    of_chunk = functools.partial(_chunk, options)
    return sums_of_logits(of_chunk, hidden, kernel, bias, (targets, weights), chunk=options.chunk, dtype=dtype)


class _Softmax(NamedTuple):
    """Of the positions of a chunk; [B, T, V] are this device's columns where the vocabulary is split."""

    logits: Array  # float32[B, T, V]
    real: Array | None  # bool[1, 1, V]: which columns are not padding; None where none is
    hit: Array  # bool[B, T, V]: the target
    target: Array  # float32[B, T]: its logit
    top: Array  # float32[B, T]: the largest logit
    exps: Array  # float32[B, T, V]: exp(logits - top)
    total: Array  # float32[B, T]: their sum

    @property
    def log_z(self) -> Array:
        return jnp.log(self.total) + self.top

    def sum(self, split: Split) -> Array:
        """float32[B, T]: of the logits."""
        shown = self.logits if self.real is None else jnp.where(self.real, self.logits, 0.0)
        return jax.lax.psum(shown.sum(axis=-1), split)


def _softmax(hidden, kernel, bias, targets, options, split) -> _Softmax:
    logits, columns, real = logits_of_chunk(hidden, kernel, bias, options.vocab_size, options.softcap, split)
    shown = logits if real is None else jnp.where(real, logits, -jnp.inf)
    top = jax.lax.pmax(shown.max(axis=-1, keepdims=True), split)
    exps = jnp.exp(shown - top)
    # A masked sum and not a gather: it stays where the vocabulary's shard is.
    hit = columns == targets[..., None]
    target = jax.lax.psum(jnp.where(hit, logits, 0.0).sum(axis=-1), split)
    return _Softmax(logits, real, hit, target, top[..., 0], exps, jax.lax.psum(exps.sum(axis=-1), split))


def log_probs(hidden, kernel, bias, targets, options: Options, split: Split) -> Float[Array, 'B T']:
    """log p of the targets of one chunk, with this device's columns of a vocabulary split over the axes `split`."""
    found = _softmax(hidden, kernel, bias, targets, options, split)
    return found.target - found.log_z


def log_probs_and_slope(
    hidden, kernel, bias, targets, options: Options, split: Split
) -> tuple[Float[Array, 'B T'], Callable[[Float[Array, 'B T']], Float[Array, 'B T V']]]:
    """`log_probs`, and what a slope by them is by the raw logits."""
    found = _softmax(hidden, kernel, bias, targets, options, split)

    def by_logits(slope: Float[Array, 'B T']) -> Float[Array, 'B T V']:
        d_logits = jnp.where(found.hit, 1.0, 0.0) - found.exps / found.total[..., None]
        if options.softcap:
            d_logits = d_logits * (1.0 - (found.logits / options.softcap) ** 2)
        return d_logits * slope[..., None]

    return found.target - found.log_z, by_logits


def cooled(
    hidden: Float[Array, 'B T D'], bias: Float[Array, ' V'] | None, temperature: float, options: Options
) -> tuple[Float[Array, 'B T D'], Float[Array, ' V'] | None]:
    """Hidden states and bias whose logits are divided by the temperature."""
    if temperature == 1.0:
        return hidden, bias
    assert not options.softcap, 'soft-capped logits are not linear in the hidden states'
    return hidden / temperature, None if bias is None else bias / temperature


def judged_log_probs(
    hidden, kernel, bias, targets, options: Options, split: Split
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """`log_probs`, and where no other token is likelier than the target."""
    found = _softmax(hidden, kernel, bias, targets, options, split)
    return found.target - found.log_z, found.target >= found.top


def _chunk(options: Options, hidden, kernel, bias, rows, columns, split):
    """Sums over one chunk: loss, nll and, where it is asked for, what is right."""
    targets, weights = rows
    size, cap, smooth = options.vocab_size, options.softcap, options.label_smoothing
    found = _softmax(hidden, kernel, bias, targets, options, split)
    log_z = found.log_z
    nll = log_z - found.target
    loss = nll
    if smooth:
        loss = (1 - smooth) * nll + smooth * (log_z - found.sum(split) / size)
    scale = 1.0
    if options.z_loss:
        loss = loss + options.z_loss * log_z**2
        scale = 1.0 + 2.0 * options.z_loss * log_z
    d_logits = found.exps * (scale / found.total)[..., None] - jnp.where(found.hit, 1.0 - smooth, 0.0)
    if smooth:
        d_logits = d_logits - (smooth / size if found.real is None else jnp.where(found.real, smooth / size, 0.0))
    if cap:
        d_logits = d_logits * (1.0 - (found.logits / cap) ** 2)
    weighted = weights.astype(jnp.float32)
    sums = (loss * weighted).sum(), (nll * weighted).sum()
    if options.judged:
        sums = *sums, ((found.target >= found.top) * weighted).sum()
    return sums, d_logits * weighted[..., None]

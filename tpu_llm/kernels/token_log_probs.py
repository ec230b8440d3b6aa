"""log p of each target by itself, for losses that are not sums over tokens; float32 [B, T, V] never exists.

The backward pass is that of `cross_entropy` with the cotangents for weights: only then is it known what each token
weighs, so the logits are computed once more. A loss that is a sum over tokens needs that not (`token_losses`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_llm.arrays import AnyArray, Array, Bool, Float, Int
from tpu_llm.kernels import cross_entropy
from tpu_llm.kernels.chunked import split_rows
from tpu_llm.kernels.cross_entropy import Options
from tpu_llm.parallel import sharding


@jax.named_scope('loss')
def token_log_probs(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    options: Options,
    dtype: jnp.dtype,
    bias: Float[Array, ' V'] | None = None,
    temperature: float = 1.0,
) -> Float[Array, 'B T']:
    """log softmax(logits / temperature) of the targets, float32; gradients flow to `hidden`, `kernel` and `bias`.

    Of the options it reads `vocab_size`, `softcap` and `chunk`.
    """
    hidden, bias = cross_entropy.cooled(hidden, bias, temperature, options)
    return _log_probs(hidden, kernel, bias, jnp.asarray(targets), options, dtype)


@jax.named_scope('loss')
def judged_log_probs(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    options: Options,
    dtype: jnp.dtype,
    bias: Float[Array, ' V'] | None = None,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """`token_log_probs`, and where no other token is likelier than the target; nothing has a gradient."""
    judged = cross_entropy.judged_log_probs
    return _by_shard(judged, 2, hidden, kernel, bias, jnp.asarray(targets), options, dtype)


def _plain(hidden, kernel, bias, targets, options, dtype):
    return _by_shard(_one, 1, hidden, kernel, bias, targets, options, dtype)[0]


def _one(*args):
    return (cross_entropy.log_probs(*args),)


def _by_shard(of_chunk, results, hidden, kernel, bias, targets, options, dtype):
    """As many arrays [B, T] as a chunk gives."""
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    layout = sharding.current()
    of_device = functools.partial(_of_device, of_chunk, options)
    if layout is None or layout.mesh.size == 1:
        return of_device(hidden, kernel, bias, targets, ())
    batch, length, vocab = layout.spec('BTV')
    rows, columns = PartitionSpec(batch, length), PartitionSpec(None, vocab)
    return sharding.manual(
        functools.partial(of_device, split=sharding.axis_names(vocab)),
        layout,
        in_specs=(rows, columns, PartitionSpec(vocab), rows),
        out_specs=(rows,) * results,
    )(hidden, kernel, bias, targets)


def _of_device(of_chunk, options, hidden, kernel, bias, targets, split):
    """Of a device's own positions, with its own part of the vocabulary."""

    def one(carry, chunk):
        return carry, of_chunk(chunk[0], kernel, bias, chunk[1], options, split)

    chunks = split_rows((hidden, targets), options.chunk, kernel.shape[1])
    _, found = jax.lax.scan(one, None, chunks)
    return tuple(x.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]] for x in found)


def _forward(hidden, kernel, bias, targets, options, dtype):
    return _log_probs(hidden, kernel, bias, targets, options, dtype), (hidden, kernel, bias, targets)


def _backward(options, dtype, kept, cotangent):
    hidden, kernel, bias, targets = kept

    def weighted(hidden, kernel, bias):
        return cross_entropy.cross_entropy(hidden, kernel, targets, -cotangent, options, dtype, bias)[0]

    _, pull = jax.vjp(weighted, hidden, kernel, bias)
    return *pull(jnp.float32(1.0)), None


_log_probs = jax.custom_vjp(_plain, nondiff_argnums=(4, 5))
_log_probs.defvjp(_forward, _backward)

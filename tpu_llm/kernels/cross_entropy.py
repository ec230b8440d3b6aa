"""The next-token loss, a few positions at a time: float32 [B, T, V] never exists.

The forward pass already knows the gradient of its logits, so it computes the gradients of `hidden` and `kernel`
chunk by chunk while the logits are at hand, and the backward pass only scales them: each logit is computed once.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tpu_llm.arrays import AnyArray, Array, Float, Int
from tpu_llm.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The loss of one position is (1 - s) * nll + s * mean over V of nll + z_loss * log(Z)².

    s is `label_smoothing` (Szegedy et al., 2015); z_loss keeps the normaliser near 1 (PaLM, §5: 1e-4). Columns
    from `vocab_size` on are padding. `chunk` positions are done at a time (0: chosen by memory).
    """

    vocab_size: int
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int = 0


def cross_entropy(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[AnyArray, 'B T'],
    weights: Float[AnyArray, 'B T'],
    options: Options,
    dtype: jnp.dtype,
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """(weighted sum of the losses, weighted sum of plain −log p), float32; only the first has a gradient.

    Matmuls are in `dtype` with float32 results. Gradients flow to `hidden` and `kernel`.
    """
    rows, length, _ = hidden.shape
    chunk = options.chunk or _auto_chunk(rows, length, kernel.shape[1])
    if length % chunk:
        raise ValueError(f'loss chunk {chunk} does not divide the {length} positions of a row')
    loss, nll = _loss(hidden, kernel, targets, weights, dataclasses.replace(options, chunk=chunk), dtype)
    return loss, jax.lax.stop_gradient(nll)


def _auto_chunk(rows: int, length: int, vocab: int) -> int:
    """The longest divisor of `length` whose logits on one device stay within a budget that its caches like."""
    layout = sharding.current()
    shape = layout.mesh.shape if layout else {}
    platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
    budget = 2**22 if platform == 'cpu' else 2**25
    share = shape.get('data', 1) * shape.get('fsdp', 1) * shape.get('expert', 1) * shape.get('tensor', 1)
    fits = max(1, budget * share // (rows * vocab))
    return max(n for n in range(1, length + 1) if length % n == 0 and (n == 1 or n <= fits))


def _plain(hidden, kernel, targets, weights, options, dtype) -> tuple[Array, Array]:
    def body(sums, chunk):
        loss, nll, _ = _chunk(chunk, kernel.astype(dtype), options)
        return (sums[0] + loss, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), _split(hidden.astype(dtype), targets, weights, options.chunk))[0]


def _forward(hidden, kernel, targets, weights, options, dtype):
    cast = kernel.astype(dtype)

    def body(carry, chunk):
        loss, nll, d_logits = _chunk(chunk, cast, options)
        d_logits = d_logits.astype(dtype)
        d_hidden = jnp.einsum('BTV,DV->BTD', d_logits, cast, preferred_element_type=jnp.float32)
        d_kernel = jnp.einsum('BTD,BTV->DV', chunk[0], d_logits, preferred_element_type=jnp.float32)
        return (carry[0] + loss, carry[1] + nll, carry[2] + d_kernel), d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(kernel.shape, jnp.float32))
    chunks = _split(hidden.astype(dtype), targets, weights, options.chunk)
    (loss, nll, d_kernel), d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape)
    return (loss, nll), (d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype))


def _backward(options, dtype, gradients, cotangents):
    scale = cotangents[0]
    d_hidden, d_kernel = gradients
    return scale * d_hidden, scale * d_kernel, None, None


_loss = jax.custom_vjp(_plain, nondiff_argnums=(4, 5))
_loss.defvjp(_forward, _backward)


def _split(hidden, targets, weights, chunk):
    """Rows stay whole, so the batch keeps its sharding: [B, T, …] → [T / chunk, B, chunk, …]."""
    count = hidden.shape[1] // chunk
    return [x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1) for x in (hidden, targets, weights)]


def _chunk(chunk, kernel, options):
    """Sums of loss and nll over one chunk, and the gradient of the loss with respect to its raw logits."""
    hidden, targets, weights = chunk
    size, cap, smooth = options.vocab_size, options.softcap, options.label_smoothing
    logits = jnp.einsum('BTD,DV->BTV', hidden, kernel, preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits, 'BTV')
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, kernel.shape[1]), 2)
    real = columns < size
    padded = kernel.shape[1] > size
    shown = jnp.where(real, logits, -jnp.inf) if padded else logits
    top = shown.max(axis=-1, keepdims=True)
    exps = jnp.exp(shown - top)
    total = exps.sum(axis=-1, keepdims=True)
    log_z = jnp.log(total) + top
    # A masked sum and not a gather: it stays where the vocabulary's shard is.
    hit = columns == targets[..., None]
    target_logit = jnp.where(hit, logits, 0.0).sum(axis=-1)
    log_z_row = log_z[..., 0]
    nll = log_z_row - target_logit
    loss = nll
    if smooth:
        mean = (jnp.where(real, logits, 0.0) if padded else logits).sum(axis=-1) / size
        loss = (1 - smooth) * nll + smooth * (log_z_row - mean)
    scale = 1.0
    if options.z_loss:
        loss = loss + options.z_loss * log_z_row**2
        scale = 1.0 + 2.0 * options.z_loss * log_z
    d_logits = exps * (scale / total) - jnp.where(hit, 1.0 - smooth, 0.0)
    if smooth:
        d_logits = d_logits - (jnp.where(real, smooth / size, 0.0) if padded else smooth / size)
    if cap:
        d_logits = d_logits * (1.0 - (logits / cap) ** 2)
    weighted = weights.astype(jnp.float32)
    return (loss * weighted).sum(), (nll * weighted).sum(), d_logits * weighted[..., None]

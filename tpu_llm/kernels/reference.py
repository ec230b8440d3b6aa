"""The oracle of every kernel test: each formula as the paper writes it, slow and obvious."""

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Bool, Float, Int


def attention(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    allowed: Bool[Array, 'B T S'],
    scale: float,
    softcap: float,
    bias: Float[Array, 'B N T S'] | None = None,
) -> Float[Array, 'B T N U']:
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum('BTNH,BSNH->BNTS', query, key) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    weights = jax.nn.softmax(scores, axis=-1, where=allowed[:, None])
    return jnp.einsum('BNTS,BSNU->BTNU', weights, value)


def cross_entropy(
    hidden: Float[Array, 'B T D'],
    kernel: Float[Array, 'D V'],
    targets: Int[Array, 'B T'],
    *,
    vocab_size: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    bias: Float[Array, ' V'] | None = None,
) -> Float[Array, 'B T']:
    """Each position's loss in nats, from whole logits."""
    logits = jnp.einsum('BTD,DV->BTV', hidden, kernel)
    logits = (logits if bias is None else logits + bias[None, None])[..., :vocab_size]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits - log_z[..., None]
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    smooth = -log_probs.mean(axis=-1)
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * log_z**2


def grouped_matmul(
    rows: Float[Array, 'M D'], kernels: Float[Array, 'E D F'], sizes: Int[Array, ' E']
) -> Float[Array, 'M F']:
    """Every row by every expert's matrix, and a mask."""
    ends, row = jnp.cumsum(sizes)[None], jnp.arange(rows.shape[0])[:, None]
    mine = (row >= ends - sizes[None]) & (row < ends)
    return jnp.einsum('ME,MD,EDF->MF', mine.astype(rows.dtype), rows, kernels)

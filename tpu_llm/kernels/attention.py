"""Attention by name: what sees what, and the implementations that compute it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Bool, Float, Int, Key
from tpu_llm.kernels import reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A query sees a key of its own segment, not later than itself if causal, less than `window` positions back.

    Positions count within segments, so the same four arrays describe packed rows, padded prompts and caches.
    Padding (segment 0) sees only padding.
    """

    query_segments: Int[Array, 'B T']
    query_positions: Int[Array, 'B T']
    key_segments: Int[Array, 'B S']
    key_positions: Int[Array, 'B S']
    causal: bool = dataclasses.field(default=True, metadata={'static': True})
    window: int = dataclasses.field(default=0, metadata={'static': True})  # 0: no limit

    def allowed(self) -> Bool[Array, 'B T S']:
        seen = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= jnp.abs(distance) < self.window
        return seen


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """Dropout on the attention weights."""

    rate: float
    key: Key[Array, '']


def attention(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K H'],
    mask: Mask,
    *,
    impl: str = 'xla',
    scale: float | None = None,
    softcap: float = 0.0,
    dropped: Dropped | None = None,
) -> Float[Array, 'B T N H']:
    """softmax(query · key * scale) · value over what `mask` allows; N is a multiple of K (GQA, Ainslie et al., 2023).

    scale defaults to 1/sqrt(H); softcap c > 0 turns scores s into c * tanh(s / c). The softmax is in float32, the
    result in the query's dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return IMPLS[impl](query, key, value, mask, scale, softcap, dropped)


def xla(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K H'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N H']:
    """Plain XLA: keys and values are never repeated, and the softmax divides the output instead of the weights."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    # Heads outermost: the products then run over contiguous [T, H] planes.
    q = (query * scale).reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask.allowed()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # The maximum only guards against overflow: its gradient is zero.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if dropped is not None:
        kept = jax.random.bernoulli(dropped.key, 1.0 - dropped.rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropped.rate), 0.0)
    out = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(query.dtype), v, preferred_element_type=jnp.float32)
    out = (out / total).astype(query.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def plain(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K H'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N H']:
    """The oracle, as an implementation one may choose while debugging."""
    assert dropped is None, 'the reference has no dropout'
    return reference.attention(query, key, value, mask.allowed(), scale, softcap)


IMPLS: dict[str, Callable[..., Array]] = {'xla': xla, 'reference': plain}

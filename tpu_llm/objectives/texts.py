"""Numbers of whole texts, of rows that hold several: sums over segments, log-probs of responses, pairs of texts.

Texts are columns: text s of a row (segment s) is column s - 1, and there are as many columns as positions, most of
them empty. Sums are over a row's own positions, so they are the same under every layout.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import AnyArray, Array, Batch, Bool, Float, Int, Key, ScoredBatch
from tpu_llm.config import ConfigError
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.policy_gradient import response_log_probs


def per_text(x: Float[AnyArray, 'B T'], segments: Int[AnyArray, 'B T']) -> Float[Array, 'B T']:
    """The sum of each text, 0 where there is none."""
    length = x.shape[1] + 1
    sums = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=length))
    return sums(jnp.asarray(x), jnp.asarray(segments))[:, 1:]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """Responses: what the policy and the reference make of them."""

    log_prob: Float[Array, '...']  # log p of the whole response
    reference: Float[Array, '...']  # the same under the reference; 0 without one
    length: Float[Array, '...']  # how many tokens of it count; 0 where there is no text

    @property
    def ratio(self) -> Float[Array, '...']:
        """log of policy over reference."""
        return self.log_prob - self.reference

    def per_token(self, x: Float[Array, '...']) -> Float[Array, '...']:
        return x / jnp.maximum(self.length, 1.0)


def said(
    log_probs: Float[Array, 'B T'], reference: Float[AnyArray, 'B T'] | None, batch: Batch, mask: Bool[AnyArray, 'B T']
) -> Said:
    """Of each text, its positions in the mask."""
    counted = jnp.asarray(mask).astype(jnp.float32)
    own = per_text(jnp.where(mask, log_probs, 0.0), batch.segments)
    other = jnp.zeros_like(own) if reference is None else per_text(jnp.where(mask, reference, 0.0), batch.segments)
    return Said(log_prob=own, reference=jax.lax.stop_gradient(other), length=per_text(counted, batch.segments))


def in_pairs(texts: Any) -> tuple[Any, Any]:
    """Of columns of texts [B, T], or a tree of such, the first of every two and the second."""

    def every_second(x: Array, first: int) -> Array:
        return x[:, first : x.shape[1] // 2 * 2 : 2]

    return tuple(jax.tree.map(lambda x, first=first: every_second(x, first), texts) for first in (0, 1))  # type: ignore


def policy_log_probs(
    model: Any, batch: Batch, key: Key[Array, ''] | None, chunk: int
) -> tuple[Float[Array, 'B T'], Routing | None]:
    """log p of the targets, and what experts did."""
    hidden, routing = model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
    return response_log_probs(model, hidden, batch.targets, chunk=chunk), routing


def reference_log_probs(frozen: Any, batch: Batch, chunk: int) -> Float[Array, 'B T']:
    """log p of the targets under a model that does not train."""
    log_probs, _ = policy_log_probs(frozen, batch, None, chunk)
    return jax.lax.stop_gradient(log_probs)


def text_values(batch: ScoredBatch) -> Float[Array, 'B T']:
    """The value of each text: of one with several marks their sum."""
    return per_text(jnp.asarray(batch.values) * batch.marks, batch.segments)


def summed(there: Bool[Array, '...'], x: Float[Array, '...']) -> Float[Array, '']:
    """Of what is there, for a metric."""
    return jax.lax.stop_gradient(jnp.sum(jnp.where(there, x, 0.0)))


def check_kind(objective: Any, name: str, kind: str) -> None:
    """Raises ConfigError where a source's examples are not what an objective learns from."""
    kinds = getattr(objective, 'kinds', None)
    if kinds is not None and kind not in kinds:
        raise ConfigError(
            f'source {name!r} is of {kind} examples, and objective {type(objective).__name__} learns from '
            f'{" or ".join(kinds)} examples; change one of them'
        )

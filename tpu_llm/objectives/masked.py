"""Masked language modelling: −log p of hidden tokens given all others; and whether a second text follows the first."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key, MaskedBatch
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.objectives.base import Sums
from tpu_llm.objectives.next_token import NextToken


@dataclasses.dataclass(kw_only=True, slots=True)
class Masked(NextToken):
    """Cross-entropy over the chosen positions (Devlin et al., 2018, arXiv 1810.04805).

    With `next_sentence` a row adds −log p of whether its second text follows, as often as it has chosen positions: rows
    then count as their tokens do, under every layout. Metrics `nll`, and `next_sentence_nll` and `next_sentence_right`
    (the share that is told right).
    """

    reads: ClassVar = MaskedBatch
    trains: ClassVar = EncoderConfig

    next_sentence: bool = False

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        assert isinstance(batch, MaskedBatch)
        types = batch.token_types
        hidden = model.hidden(
            batch.tokens, segments=batch.segments, positions=batch.positions, token_types=types, key=key
        )
        loss, weight, sums = self.sums(model, model.transformed(hidden), batch)
        if not self.next_sentence:
            return loss, weight, sums
        logits = model.next_sentence(model.pool(hidden, jnp.asarray(batch.segments)))
        label, rows = jnp.asarray(batch.unrelated), jnp.sum(batch.weights, axis=1)
        nll = jnp.sum(rows * -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0])
        right = jnp.sum(rows * (jnp.argmax(logits, axis=1) == label))
        sums |= {'next_sentence_nll': jax.lax.stop_gradient(nll), 'next_sentence_right': right}
        return loss + nll, weight, sums

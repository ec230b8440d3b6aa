"""Language modelling: −log p of each next token."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.models.decoder import Decoder
from tpu_llm.objectives.base import Sums


@dataclasses.dataclass(kw_only=True, slots=True)
class NextToken:
    """Cross-entropy over the batch's weighted positions; metric `nll` is without z-loss and smoothing."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int = machine(0)  # positions of a row whose logits exist at a time; 0 chooses by memory

    def validate(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f'label_smoothing is {self.label_smoothing}; write a number from 0 to below 1')
        if self.z_loss < 0 or self.chunk < 0:
            raise ConfigError(f'z_loss = {self.z_loss} and chunk = {self.chunk} must not be negative')

    def __call__(
        self,
        model: Decoder,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        hidden = model.hidden(batch.tokens, segments=batch.segments, positions=batch.positions, dropout_key=key)
        options = Options(
            vocab_size=model.vocab_size,
            softcap=model.logit_softcap,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )
        loss, nll = cross_entropy(
            hidden, model.unembedding(), batch.targets, batch.weights, options, jnp.dtype(model.dtype)
        )
        return loss, jnp.sum(batch.weights), {'nll': nll}

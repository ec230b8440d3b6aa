"""Language modelling: −log p of each next token."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.base import Sums, routing_sums


@dataclasses.dataclass(kw_only=True, slots=True)
class NextToken:
    """Cross-entropy over the batch's weighted positions; metric `nll` is without z-loss and smoothing."""

    reads: ClassVar[type[Batch]] = Batch
    trains: ClassVar[Any] = DecoderConfig
    needs_frozen: ClassVar[bool] = False  # whether it is given a second model, that does not train

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int = machine(0)  # positions of a row whose logits exist at a time; 0 chooses by memory

    def validate(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f'label_smoothing is {self.label_smoothing}; write a number from 0 to below 1')
        if self.z_loss < 0 or self.chunk < 0:
            raise ConfigError(f'z_loss = {self.z_loss} and chunk = {self.chunk} must not be negative')

    def read(
        self, model: Any, batch: Batch, key: Key[Array, ''] | None
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        """The hidden states from which the targets are predicted, and what experts did."""
        return model.routed(batch.tokens, segments=batch.segments, positions=batch.positions, key=key)

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        hidden, routing = self.read(model, batch, key)
        loss, weight, sums = self.sums(model, hidden, batch)
        extra, routed = routing_sums(routing, weight)
        return loss + extra, weight, {**sums, **routed}

    def sums(
        self, model: Any, hidden: Float[Array, 'B T D'], batch: Batch
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]:
        """Of loss, weight and `nll`, from what the unembedding takes."""
        loss, nll = cross_entropy(
            hidden,
            model.unembedding(),
            batch.targets,
            batch.weights,
            self.options(model),
            jnp.dtype(model.dtype),
            model.logit_bias(),
        )
        return loss, jnp.sum(batch.weights), {'nll': nll}

    def options(self, model: Any) -> Options:
        return Options(
            vocab_size=model.vocab_size,
            softcap=model.logit_softcap,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )

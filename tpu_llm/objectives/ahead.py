"""Multi-token prediction: −log p of each next token, and of tokens behind it from the same beginning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.kernels.cross_entropy import judged_cross_entropy
from tpu_llm.nn.ahead import shifted
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.base import Sums, routing_sums
from tpu_llm.objectives.next_token import NextToken


@dataclasses.dataclass(kw_only=True, slots=True)
class Ahead(NextToken):
    """`NextToken`, and `weight` times the mean over depths of their losses (DeepSeek-V3, 2024, arXiv 2412.19437,
    equations 24 and 25; there 0.3 for the first ten of 14.8 trillion tokens, then 0.1).

    Depth k predicts targets k further on, where they are of the same segment, with the weights they have there. Like
    the losses of the paper, those of depths are divided by what all next tokens weigh: the last k of a segment count as
    0. Metrics: `nll` of next tokens, and of each depth `ahead_k_nll` and `ahead_k_right`, how often it is right.
    """

    weight: float = 0.3

    def validate(self) -> None:
        NextToken.validate(self)
        if self.weight <= 0:
            raise ConfigError(f'weight = {self.weight} must be above 0; without further tokens, use NextToken')

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
        routings = [routing]
        depths = model.look_ahead(hidden, batch.tokens, segments=batch.segments, positions=batch.positions, key=key)
        for k, (further, inside, routing) in enumerate(depths, 1):
            weights = jnp.where(inside > 0, shifted(batch.weights, k), 0.0)
            extra, nll, right = judged_cross_entropy(
                further,
                model.unembedding(),
                shifted(batch.targets, k),
                weights,
                self.options(model),
                jnp.dtype(model.dtype),
                model.logit_bias(),
            )
            loss = loss + self.weight / len(model.ahead) * extra
            sums |= {f'ahead_{k}_nll': nll, f'ahead_{k}_right': right}
            routings.append(routing)
        balance, routed = routing_sums(_joined(routings), weight)
        return loss + balance, weight, {**sums, **routed}


def _joined(routings: list[Routing | None]) -> Routing | None:
    """Of all layers with experts, those of depths behind the model's."""
    kept = [each for each in routings if each is not None]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if kept else None

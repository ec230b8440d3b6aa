"""The contract of an objective."""

from typing import Any, Protocol

import jax

from tpu_llm.arrays import Array, Batch, Float, Int, Key
from tpu_llm.nn.context import Routing

Sums = dict[str, Float[Array, '...']]


class Objective(Protocol):
    """A config dataclass that is also the loss; its fields are read while the step is traced.

    Returns sums, never means: (loss_sum, weight_sum, metric_sums), float32. The step adds them over microbatches
    and devices and divides once by the global weight_sum, so a token weighs the same under every layout.
    `frozen` is whatever the objective needs but must not train (a reference policy, a teacher), `key` the step's
    dropout key or None in evaluation.
    """

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        frozen: Any,
        key: Key[Array, ''] | None,
        step: Int[Array, ''],
    ) -> tuple[Float[Array, ''], Float[Array, ''], Sums]: ...


def routing_sums(routing: Routing | None, weight: Float[Array, '']) -> tuple[Float[Array, ''] | float, Sums]:
    """The experts' losses and statistics (means over tokens) as sums, to be divided by the weight again.

    Every objective of a model with experts adds the first to its loss.
    """
    if routing is None:
        return 0.0, {}
    sums = {'balance': routing.loss.sum(), 'expert_load': routing.load}
    sums |= {'expert_entropy': routing.entropy, 'expert_dropped': routing.dropped}
    return weight * sums['balance'], {name: weight * jax.lax.stop_gradient(value) for name, value in sums.items()}

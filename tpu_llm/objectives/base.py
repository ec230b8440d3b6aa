"""The contract of an objective."""

from typing import Any, Protocol

from tpu_llm.arrays import Array, Batch, Float, Int, Key

Sums = dict[str, Float[Array, '']]


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

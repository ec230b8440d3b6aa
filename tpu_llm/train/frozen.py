"""What a step reads and does not change: learning rate and key of the run, its own weights that do not train, and
another model's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Float, Key
from tpu_llm.config import ConfigError, machine
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.sharding import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """The step's second argument, never donated.

    Peak and key are here and not in the program: runs that differ only in rate or seed share a compiled step.
    """

    peak: Float[Array, '']  # of the learning rate
    key: Key[Array, '']  # of the run; each step folds its number in
    base: Mapping[str, Array | jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)  # by path
    other: Any = None  # the weights, by path, of the model that the objective is given as `frozen`

    def model(self, graph: ModelGraph | None) -> Any:
        """That model. Where it has no weights of its own they are those of `base`; without a graph `other` as it is."""
        if graph is None:
            return self.other
        return graph.bind(self.base if self.other is None else self.other)


def start_frozen(peak: float, seed: int, layout: Layout) -> Frozen:
    """That of a run in which every weight trains, on every device."""
    values = Frozen(peak=jnp.float32(peak), key=jax.random.key(seed))
    return jax.jit(lambda x: x, out_shardings=layout.replicated)(values)


@dataclasses.dataclass(kw_only=True, slots=True)
class Reference:
    """A model beside the one that trains: a reference policy, a teacher, a reward model."""

    weights: str = ''  # as `origin.weights`; '' is what the run itself starts from
    model: Any = None  # its config; None: as the run's
    dtype: str = machine('float32')  # in which its weights are held

    def validate(self) -> None:
        if self.model is not None and not self.weights:
            raise ConfigError('reference.model has no weights; set reference.weights to where they are')
        if self.dtype not in ('float32', 'bfloat16'):
            raise ConfigError(f"reference.dtype is {self.dtype!r}; write 'float32' or 'bfloat16'")

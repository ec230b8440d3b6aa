"""A model without its weights, for the pure functions that train and run it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from tpu_llm.arrays import Array
from tpu_llm.nn.param import named_params, padding_size


class ModelGraph:
    """`bind(weights)` gives the model back with weights by path, also while a function of them is traced.

    `trains` says by path which of them a run changes; all, unless it is given.
    """

    def __init__(self, model: nnx.Module, trains: Callable[[str], bool] | None = None):
        self.graph, state = nnx.split(model)
        self.leaves = dict(named_params(model))
        self.paths = [path for path, _ in nnx.to_flat_state(state)]
        assert len(self.paths) == len(self.leaves), 'a model holds parameters only'
        self.trained = {name: leaf for name, leaf in self.leaves.items() if trains is None or trains(name)}

    def bind(self, weights: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Any:
        leaves = [leaf.replace(weights[name]) for name, leaf in self.leaves.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(list(zip(self.paths, leaves, strict=True))))

    def count(self) -> int:
        """How many numbers the model has, vocabulary padding not counted."""
        return sum(leaf.size - padding_size(leaf) for leaf in self.leaves.values())

    def count_trained(self) -> int:
        """How many of them a run changes."""
        return sum(leaf.size - padding_size(leaf) for leaf in self.trained.values())

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self.leaves.items()}

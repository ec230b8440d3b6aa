"""Toy models with something added to them that trains, its numbers drawn as if it had been trained for a while."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toy

from tpu_llm.arrays import Array
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params
from tpu_llm.peft.wrapping import draw_added, put

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def base(**changes: Any) -> Any:
    graph = toy.graph(toy.config(**changes))
    return graph.bind(toy.weights(graph))


def wrapped(kind: Any, **changes: Any) -> Any:
    """As at the start of a run."""
    model = base(**changes)
    kind.wrap(model)
    draw_added(model, 0)
    return model


def noisy(model: Any, seed: int = 0) -> Any:
    """The same model with noise on all that was added."""
    added = {path: leaf for path, leaf in named_params(model) if leaf.get_metadata('added')}
    random = np.random.default_rng(seed)
    put(model, {path: leaf[...] + 0.3 * random.standard_normal(leaf.shape, 'f4') for path, leaf in added.items()})
    return model


def weights(model: Any) -> dict[str, Array]:
    return {path: leaf.get_value() for path, leaf in named_params(model)}


def program(model: Any, tokens: Any = TOKENS) -> tuple[Any, dict[str, Array]]:
    """A compiled function from weights to logits, and weights for it."""
    graph = ModelGraph(model)
    return jax.jit(lambda weights: graph.bind(weights)(jnp.asarray(tokens))), weights(model)


def says(model: Any, tokens: Any = TOKENS) -> Array:
    run, weights = program(model, tokens)
    return run(weights)

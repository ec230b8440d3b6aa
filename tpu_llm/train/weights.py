"""The weights that a run starts from and those that it only holds, each straight onto its shards.

They are drawn, or read from `origin.weights`; what reading does not give (an adapter, a reward head) is drawn.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.checkpoint import resume
from tpu_llm.checkpoint.pretrained import Source
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import draw, named_params, param_sharding
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.frozen import Frozen
from tpu_llm.train.run import Run
from tpu_llm.train.saved import Saved
from tpu_llm.train.state import Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Graphs:
    """The models of a run, without weights."""

    model: ModelGraph  # the one that trains
    bare: ModelGraph  # the same without what `peft` adds to it
    reference: ModelGraph | None = None  # the one that the objective is given as `frozen`


def starting(run: Run, graphs: Graphs, layout: Layout, tokenizer: str) -> Params:
    """Every weight of the run's model at step 0, by path."""
    weights = of_model(run.origin.weights, run.model, graphs.bare, layout, tokenizer, run.seed)
    return weights if run.peft is None else _adapted(run, weights, graphs, layout)


def with_held(frozen: Frozen, run: Run, graphs: Graphs, layout: Layout, tokenizer: str, start: Params) -> Frozen:
    """The same with the weights that the run holds besides its state, of those that it starts from."""
    base = {name: value for name, value in start.items() if name not in graphs.model.trained}
    reference = run.reference
    if reference is None:
        return dataclasses.replace(frozen, base=base)
    assert graphs.reference is not None
    path, field = (reference.weights, 'reference.weights') if reference.weights else (run.origin.weights, 'weights')
    other = of_model(path, reference.model or run.model, graphs.reference, layout, tokenizer, run.seed, field)
    return dataclasses.replace(frozen, base=base, other=jax.tree.map(lambda x: x.astype(reference.dtype), other))


def abstract_frozen(run: Run, graphs: Graphs, layout: Layout) -> Frozen:
    """The shapes and shardings of it."""

    def place(name: str, leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=param_sharding(layout, name, leaf))

    like = jax.eval_shape(lambda: Frozen(peak=jnp.zeros(()), key=jax.random.key(0)))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.replicated), like)
    leaves = graphs.model.leaves
    base = {name: place(name, leaf, leaf.dtype) for name, leaf in leaves.items() if name not in graphs.model.trained}
    if run.reference is None or graphs.reference is None:
        return dataclasses.replace(frozen, base=base)
    other = {name: place(name, leaf, run.reference.dtype) for name, leaf in graphs.reference.leaves.items()}
    return dataclasses.replace(frozen, base=base, other=other)


def of_model(
    path: str, config: Any, graph: ModelGraph, layout: Layout, tokenizer: str, seed: int, field: str = 'weights'
) -> Params:
    """Every weight of a model, by path: read, or without a `path` (that `field` names) drawn."""
    if not path:
        return draw(graph.leaves, seed, layout)
    source = resume.open_weights(path, config, tokenizer, field)
    read = _read(source, graph, layout)
    return {**read, **draw({name: leaf for name, leaf in graph.leaves.items() if name not in read}, seed, layout)}


def _read(source: Source, graph: ModelGraph, layout: Layout) -> Params:
    """What the source holds of the model; all of it but what is `added`."""
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_sharding(layout, name, leaf))
        for name, leaf in graph.leaves.items()
        if not leaf.get_metadata('added') or f'params.{name}' in source.tensors
    }
    if source.kind != 'tpu_llm':
        return source.load(graph, like, _unheard)
    saved = Saved(graph, _state_of(like))
    return saved.padded({'params': source.load(graph, saved.shapes()['params'], _unheard)})['params']


def _unheard(name: str) -> None:
    """Reading a run's weights is not worth a line a tensor."""


def _state_of(params: Any) -> TrainState:
    """Parameters as a state that has nothing else."""
    others = {field.name: None for field in dataclasses.fields(TrainState) if field.name != 'params'}
    return TrainState(params=params, **others)  # type: ignore


def _adapted(run: Run, weights: Params, graphs: Graphs, layout: Layout) -> Params:
    """Every weight of the model with what `peft` adds: made of the bare model's where it needs them, else drawn."""
    assert run.peft is not None
    model = graphs.bare.bind(weights)
    with sharding.use(layout):
        run.peft.wrap(model)
    made: Params = {}
    for name, leaf in named_params(model):
        value = leaf.get_value()
        if not isinstance(value, jax.ShapeDtypeStruct):
            made[name] = jax.device_put(value, param_sharding(layout, name, graphs.model.leaves[name]))
    missing = {name: leaf for name, leaf in graphs.model.leaves.items() if name not in made}
    return {**made, **draw(missing, run.seed, layout)}

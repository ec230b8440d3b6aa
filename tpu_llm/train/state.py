"""What training changes: parameters by path, optimizer state, moving average, counters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import initialise, named_params, param_sharding
from tpu_llm.optim.optimizer import Update
from tpu_llm.parallel.sharding import Layout

Params = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """A pure tree: a step maps one to the next, and a checkpoint is its leaves by name."""

    step: Int[Array, '']  # updates tried so far, skipped ones included
    params: Params
    optimizer: optax.OptState
    ema: Params | None  # exponential moving average of the parameters, where asked for
    bad_in_a_row: Int[Array, '']
    skipped: Int[Array, '']
    loss_mean: Float[Array, '']  # moving mean and variance of the loss, for spotting spikes
    loss_variance: Float[Array, '']


def abstract_state(graph: ModelGraph, tx: Update, layout: Layout, *, ema: bool) -> TrainState:
    """The state's shapes and shardings, nothing allocated: what restore fills and the planner compiles for."""
    shapes = graph.shapes()
    trained = {name: shapes[name] for name in graph.trained}
    shapes = jax.eval_shape(lambda params: _fresh(params, tx, ema), trained)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, graph, layout),
    )


def create_state(
    model: nnx.Module,
    graph: ModelGraph,
    tx: Update,
    layout: Layout,
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """Draws the parameters and starts the optimizer, every array on its shards from the start."""
    initialise(model, seed, layout)
    params = {name: leaf.get_value() for name, leaf in named_params(model) if name in graph.trained}
    return start_state(params, graph, tx, layout, ema=ema)


def start_state(params: Params, graph: ModelGraph, tx: Update, layout: Layout, *, ema: bool) -> TrainState:
    """The state at step 0 from the parameters that train, which it takes over."""
    shardings = state_shardings(jax.eval_shape(lambda p: _fresh(p, tx, ema), params), graph, layout)
    return jax.jit(lambda p: _fresh(p, tx, ema), out_shardings=shardings, donate_argnums=0)(params)


def _fresh(params: Params, tx: Update, ema: bool) -> TrainState:
    def count() -> Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=count(),
        params=params,
        optimizer=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        bad_in_a_row=count(),
        skipped=count(),
        loss_mean=jnp.zeros(()),
        loss_variance=jnp.zeros(()),
    )


def state_shardings(shapes: TrainState, graph: ModelGraph, layout: Layout) -> TrainState:
    """Where each leaf lies: parameters and their moments by their dims, everything else replicated."""
    params = {name: param_sharding(layout, name, leaf) for name, leaf in graph.leaves.items()}
    moments = {
        name: layout.named(layout.rules.optimizer, leaf.get_metadata('dims'), leaf.shape, name).spec
        for name, leaf in graph.leaves.items()
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = parameter_of(path, leaf, graph)
        if name is None:
            return layout.replicated
        if path[0].name in ('params', 'ema'):
            return params[name]
        # What was averaged over cannot be split.
        spec = (None if size == 1 else axes for axes, size in zip(moments[name], leaf.shape, strict=True))
        return NamedSharding(layout.mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def parameter_of(path: tuple[Any, ...], leaf: Any, graph: ModelGraph) -> str | None:
    """The parameter that a leaf of the state is, or is a moment of: optax keeps moments under its key, some of them
    below the key of a group ('muon'). A factored moment has the parameter's rank, and size 1 where it is a mean.
    """
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in graph.leaves]
    if not names or leaf.ndim != graph.leaves[names[0]].ndim:
        return None
    fits = all(a in (b, 1) for a, b in zip(leaf.shape, graph.leaves[names[0]].shape, strict=True))
    return names[0] if fits else None

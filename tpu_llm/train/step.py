"""One training step: gradients of sums, one division, one update. Pure, and donated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch
from tpu_llm.models.graph import ModelGraph
from tpu_llm.objectives.base import Objective, Sums
from tpu_llm.optim.optimizer import Update
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.frozen import Frozen
from tpu_llm.train.state import Params, TrainState

Metrics = dict[str, Array]
LossSum = Callable[[Params, Batch, Array], tuple[Array, Sums]]
Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]

# The moving loss statistics forget with a half-life of about 70 steps, and judge from step 100 on.
_MEMORY = 0.99
_JUDGE_FROM = 100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    accumulate: int = 1
    ema: float = 0.0
    spike: float = 0.0


def make_step(
    graph: ModelGraph,
    objective: Objective,
    tx: Update,
    layout: Layout,
    options: StepOptions = StepOptions(),
    reference: ModelGraph | None = None,
) -> Step:
    """`step(state, frozen, batch) -> (state, metrics)`; jit it with the state donated. `frozen` brings the peak of the
    learning rate and the key of what is drawn.

    With a `reference` the objective's `frozen` is that model with the weights `frozen.other`, or, where there are none,
    those that do not train.

    A step whose loss or gradient norm is not finite (or, with `spike` s > 0, whose loss lies more than s
    standard deviations above its moving mean) leaves parameters and optimizer as they were and is counted. The
    learning rate, a metric too, is that of the step, whatever was skipped before it.
    """

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        with sharding.use(layout):
            key = jax.random.fold_in(frozen.key, state.step)
            loss_sum = _loss_sum(graph, objective, frozen, reference, state.step)
            sums, gradients = _accumulate(loss_sum, graph, state.params, batch, key, options.accumulate, layout)
            weight = sums.pop('weight')
            divisor = jnp.where(weight > 0, weight, 1.0)  # a batch of padding has neither loss nor gradient
            metrics = {name: total / divisor for name, total in sums.items()}
            gradients = jax.tree.map(lambda g: g / divisor, gradients)
            gradients = _place(gradients, graph, layout)
            metrics['grad_norm'] = tx.norm(gradients)
            good = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
            if options.spike:
                good &= ~_is_spike(state, metrics['loss'], options.spike)
            params, optimizer, metrics['learning_rate'] = tx(
                gradients, state.optimizer, state.params, state.step, frozen.peak
            )
            new = _advance(state, params, optimizer, metrics['loss'], options.ema)
            kept = dataclasses.replace(
                jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state),
                step=new.step,
                bad_in_a_row=jnp.where(good, 0, state.bad_in_a_row + 1),
                skipped=state.skipped + ~good,
            )
            metrics |= {'weight': weight, 'bad_in_a_row': kept.bad_in_a_row, 'skipped': kept.skipped}
        return kept, metrics

    return step


def _loss_sum(
    graph: ModelGraph, objective: Objective, frozen: Frozen, reference: ModelGraph | None, step: Array
) -> LossSum:
    """(loss sum, all sums) as a function of what trains, rows and a key."""

    def loss_sum(params: Params, rows: Batch, key: Array) -> tuple[Array, Sums]:
        model = graph.bind({**frozen.base, **params})
        loss, weight, sums = objective(model, rows, frozen=frozen.model(reference), key=key, step=step)
        return loss, {'loss': loss, 'weight': weight, **sums}

    return loss_sum


def _accumulate(
    loss_sum: LossSum, graph: ModelGraph, params: Params, batch: Batch, key: Array, count: int, layout: Layout
) -> tuple[Sums, Params]:
    """Sums of loss, weight and metrics, and the gradient of the loss sum, over `count` microbatches."""
    gradient = jax.grad(loss_sum, has_aux=True)
    if count == 1:
        gradients, sums = gradient(params, batch, key)
        return sums, gradients

    def micro(carry: tuple[Params, Sums], scanned: tuple[Batch, Array]) -> tuple[tuple[Params, Sums], None]:
        rows, index = scanned
        gradients, sums = gradient(params, rows, jax.random.fold_in(key, index))
        total = jax.tree.map(jnp.add, carry, (gradients, sums))
        return (_place(total[0], graph, layout), total[1]), None

    # Every device keeps its own rows: microbatch i takes each count-th row.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, sums), _ = jax.lax.scan(micro, zeros, (split, jnp.arange(count)))
    return sums, gradients


def _place(gradients: Params, graph: ModelGraph, layout: Layout) -> Params:
    table = layout.rules.gradients
    dims = {name: leaf.get_metadata('dims') for name, leaf in graph.trained.items()}
    return {name: sharding.constrain(g, dims[name], table) for name, g in gradients.items()}


def _is_spike(state: TrainState, loss: Array, spike: float) -> Array:
    limit = state.loss_mean + spike * jnp.sqrt(state.loss_variance)
    return (state.step >= _JUDGE_FROM) & (loss > limit)


def _advance(state: TrainState, params: Any, optimizer: Any, loss: Array, ema: float) -> TrainState:
    # Starting at the first good step's loss rather than 0 spares a bias correction.
    first = state.step == state.skipped
    mean = jnp.where(first, loss, _MEMORY * state.loss_mean + (1 - _MEMORY) * loss)
    deviation = jnp.square(loss - mean)
    variance = jnp.where(first, 0.0, _MEMORY * state.loss_variance + (1 - _MEMORY) * deviation)
    average = state.ema
    if average is not None:
        average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, average, params)
    return TrainState(
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        ema=average,
        bad_in_a_row=state.bad_in_a_row,
        skipped=state.skipped,
        loss_mean=mean,
        loss_variance=variance,
    )

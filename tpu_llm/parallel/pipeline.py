"""The pipeline: layers split over the mesh's `stage` axis, microbatches passed round the ring of stages.

Stage s of P holds the layers of virtual stages s, P + s, 2P + s, …: each microbatch goes round `circles` times. With
one circle this is GPipe (Huang et al., 2018, arXiv 1811.06965), with more the circular, interleaved schedule (Narayanan
et al., 2021, arXiv 2104.04473), whose bubble is as many times smaller. At tick t stage s works on item t - s, item j
being microbatch j mod M on circle j div M; then every stage hands its result to the next. What the last stage hands
to the first is either an input of the next circle or the result.

Outside the stack `stage` is one more axis that the batch is split over, so no stage computes an embedding or a logit
twice: the microbatches are gathered on the way in and scattered on the way out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError, machine
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import Layout

# (weights of some layers, their numbers, x, context) → x and what they give back, stacked; -1 is the number of no layer
Layers = Callable[[Any, Int[Array, ' L'], Float[Array, 'B T D'], Any], tuple[Float[Array, 'B T D'], Any]]


@dataclasses.dataclass(kw_only=True, slots=True)
class Pipeline:
    """How the batch passes through the stages; without stages nothing of it matters."""

    microbatches: int = machine(0)  # of a step; a multiple of the stages. 0: twice as many
    circles: int = machine(1)  # times a microbatch goes round the stages

    def validate(self) -> None:
        if self.microbatches < 0 or self.circles < 1:
            raise ConfigError(
                f'pipeline.microbatches = {self.microbatches} must not be negative, and circles = {self.circles} '
                'at least 1'
            )

    def count(self, stages: int) -> int:
        """Microbatches for so many stages. Raises ConfigError unless they are a multiple of the stages."""
        count = self.microbatches or 2 * stages
        if count % stages:
            below = count // stages * stages
            near = f'{below} or {below + stages}' if below else str(stages)
            raise ConfigError(
                f'pipeline.microbatches = {count} is not a multiple of the {stages} stages; the nearest: {near}'
            )
        return count


def order(layers: int, stages: int, circles: int) -> list[int]:
    """The layer in each slot, stage by stage and circle by circle; -1 pads the last virtual stages.

    Raises ConfigError where there are fewer layers than virtual stages.
    """
    if layers and layers < stages * circles:
        raise ConfigError(
            f'{layers} layers (repeats of the period) are fewer than {stages} stages x {circles} circles = '
            f'{stages * circles}; the nearest that hold: mesh.stage = {min(stages, layers)} with '
            f'pipeline.circles = {max(layers // stages, 1)}'
        )
    each = -(-layers // (stages * circles))
    starts = [(circle * stages + stage) * each for stage in range(stages) for circle in range(circles)]
    return [layer if layer < layers else -1 for start in starts for layer in range(start, start + each)]


def overhead(layers: int, stages: int, circles: int, microbatches: int) -> float:
    """Executed over needed work of the stack: (M R + P - 1) / (M R), times the padded layers over the real ones."""
    ticks = microbatches * circles + stages - 1
    return ticks / (microbatches * circles) * len(order(layers, stages, circles)) / layers


def describe(layers: int, stages: int, circles: int, microbatches: int) -> str:
    """One line on the bubble: the share of the stack's executed work that is not needed."""
    share = 1 - 1 / overhead(layers, stages, circles, microbatches)
    padding = order(layers, stages, circles).count(-1)
    slots = f', {padding} of its slots without layers' if padding else ''
    return f'pipeline: {stages} stages, {microbatches} microbatches, {circles} circle(s): {share:.1%} bubble{slots}'


def pipelined(
    run: Layers,
    weights: Any,
    layers: Int[Array, ' L'],
    x: Float[Array, 'B T D'],
    context: Any,
    tokens: Int[Array, ' B'],
    layout: Layout,
    *,
    circles: int,
    microbatches: int,
) -> tuple[Float[Array, 'B T D'], Any]:
    """Runs x through all layers, whose weights are stacked in `order`.

    Every array of `context` leads with B. What the layers give back is averaged over the microbatches, weighted by the
    `tokens` of their rows, and stacked like the weights.
    """
    stages = layout.mesh.shape['stage']
    here = PartitionSpec('stage')

    def body(weights: Any, layers: Array, x: Array, context: Any, tokens: Array) -> tuple[Array, Any]:
        weights, layers = jax.tree.map(lambda w: w.reshape(circles, -1, *w.shape[1:]), (weights, layers))
        inputs, contexts, shares = jax.tree.map(lambda a: _gather(a, microbatches // stages), (x, context, tokens))
        shares = shares.sum(axis=1) / jnp.maximum(shares.sum(), 1)
        out, given = _ring(run, weights, layers, inputs, contexts, shares)
        given = jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), given)
        return _scatter(out), given

    mapped = sharding.manual(body, layout, axes=('stage',), in_specs=(here,) * 5, out_specs=here)
    return mapped(weights, layers, x, context, tokens)


def _ring(run: Layers, weights: Any, layers: Array, inputs: Array, contexts: Any, shares: Array) -> tuple[Array, Any]:
    """All ticks. `inputs` [M, B, T, D] is only read and written by the first stage, which ends with the results."""
    stages, stage = jax.lax.axis_size('stage'), jax.lax.axis_index('stage')
    count, circles = inputs.shape[0], layers.shape[0]
    items, ahead = count * circles, [(s, (s + 1) % stages) for s in range(stages)]

    def arrive(inputs: Array, handed: Array, tick: Array | int) -> Array:
        item = tick - stages  # what the last stage has just finished
        at = jnp.maximum(item, 0) % count
        return inputs.at[at].set(jnp.where((stage == 0) & (item >= 0), handed, inputs[at]))

    def one_tick(carry: tuple[Array, Array, Any], tick: Array) -> tuple[tuple[Array, Array, Any], None]:
        inputs, handed, given = carry
        inputs = arrive(inputs, handed, tick)
        item = jnp.clip(tick - stage, 0, items - 1)
        works = item == tick - stage
        # With one circle a static 0: a slice of all weights by a traced index is a copy of them, each tick.
        micro, circle = item % count, (item // count if circles > 1 else 0)
        x = jnp.where(stage == 0, inputs[micro], handed)
        now = jax.tree.map(lambda w: w[circle], weights)
        x, new = run(now, layers[circle], x, jax.tree.map(lambda c: c[micro], contexts))
        share = jnp.where(works, shares[micro], 0.0)
        given = jax.tree.map(lambda total, each: total.at[circle].add(share * each), given, new)
        return (inputs, jax.lax.ppermute(x, 'stage', ahead), given), None

    shapes = jax.eval_shape(run, *jax.tree.map(lambda a: a[0], (weights, layers, inputs, contexts)))[1]
    given = jax.tree.map(lambda s: jnp.zeros((circles, *s.shape), s.dtype), shapes)
    start = (inputs, jnp.zeros_like(inputs[0]), given)
    (inputs, handed, given), _ = jax.lax.scan(one_tick, start, jnp.arange(items + stages - 1))
    return arrive(inputs, handed, items + stages - 1), given


def _gather(local: Array, each: int) -> Array:
    """This stage's rows [B / P, …] as microbatches, and everyone's: [M, B / M, …]. Devices keep their own rows."""
    split = local.reshape(-1, each, *local.shape[1:]).swapaxes(0, 1)
    return jax.lax.all_gather(split, 'stage', tiled=True)


def _scatter(results: Array) -> Array:
    """The inverse of `_gather`, of what the first stage holds."""
    mine = jnp.where(jax.lax.axis_index('stage') == 0, results, 0)
    split = jax.lax.psum_scatter(mine, 'stage', scatter_dimension=0, tiled=True)
    return split.swapaxes(0, 1).reshape(-1, *split.shape[2:])

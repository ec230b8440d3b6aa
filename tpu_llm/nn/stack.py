"""The layers of a model: a prefix, a period that repeats, a suffix.

Real models are not one block repeated: Gemma-3 has 62 layers with a period of 6, DeepSeek-V3 3 dense layers and
58 with experts. The period's parameters are stacked ('L' leads their dims) and scanned, so a program's size and
compile time do not grow with depth. Whatever the grouping, weights are named and drawn by their layer's index.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError, nearest
from tpu_llm.nn.cache import LayerCache, StateCache
from tpu_llm.nn.context import Context, LayerOut, Routing
from tpu_llm.parallel import pipeline, sharding

# Tensors a remat policy may keep, by their checkpoint_name. The last two are what a norm behind attention or MLP takes.
REMAT_NAMES = ('query', 'key', 'value', 'latent', 'attended', 'gate', 'up', 'attention_out', 'mlp_out')


class Stack(nnx.Module):
    """Layers in model order: prefix, then the blocks of `period` in turn `repeats` times, then suffix."""

    def __init__(
        self,
        prefix: Sequence[nnx.Module],
        period: Sequence[nnx.Module],
        suffix: Sequence[nnx.Module],
        *,
        slots: Sequence[int],
        remat: str,
        unroll: int,
        circles: int = 1,
        microbatches: int = 0,
    ):
        self.prefix = nnx.List(prefix)
        self.period = nnx.List(period)  # parameters stacked in the order of `slots`
        self.suffix = nnx.List(suffix)
        self.slots = tuple(slots)  # which repeat of the period; -1 is a slot without layers (see parallel/pipeline.py)
        self.repeats = max(slots, default=-1) + 1
        self.layers = len(prefix) + self.repeats * len(period) + len(suffix)
        self.circles = circles
        self.microbatches = microbatches
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Float[Array, 'B T D'], context: Context) -> tuple[Float[Array, 'B T D'], list[LayerOut]]:
        """Runs all layers. What each gives back comes in the order of `groups`, stacked where they are."""
        caches = iter(context.cache.layers) if context.cache else itertools.repeat(None)
        outs: list[LayerOut] = []
        for index, block in enumerate(self.prefix):
            x, out = self._one(block, x, context, index, next(caches))
            outs.append(out)
        if self.period:
            x, stacked = self._scan(x, context, [next(caches) for _ in self.period])
            outs += stacked
        for index, block in enumerate(self.suffix, self.layers - len(self.suffix)):
            x, out = self._one(block, x, context, index, next(caches))
            outs.append(out)
        return x, outs

    def _one(
        self, block: nnx.Module, x: Array, context: Context, index: int, cache: LayerCache | StateCache | None
    ) -> tuple[Array, LayerOut]:
        if self.remat == 'none':
            return block(x, context, index, cache)
        graph, state = nnx.split(block)
        return rematerialised(_block_fn(graph), self.remat, context)(state, x, context, index, cache)

    def _scan(
        self, x: Array, context: Context, caches: list[LayerCache | StateCache | None]
    ) -> tuple[Array, list[LayerOut]]:
        graphs, states = zip(*(nnx.split(block) for block in self.period), strict=True)
        layout, run = sharding.current(), functools.partial(self._run, graphs)
        if layout is None or layout.mesh.shape['stage'] == 1 or context.cache is not None:
            return run(self._in_order(states), jnp.arange(self.repeats), x, context, caches)
        x, outs = pipeline.pipelined(
            run,
            states,
            jnp.asarray(self.slots),
            x,
            context,
            context.real.sum(axis=1),
            layout,
            circles=self.circles,
            microbatches=self.microbatches,
        )
        return x, self._in_order(outs)

    def _in_order(self, stacked: Any) -> Any:
        """From slots to the layers' own order."""
        if self.slots == tuple(range(self.repeats)):
            return stacked
        order = np.array([self.slots.index(repeat) for repeat in range(self.repeats)])
        return jax.tree.map(lambda x: x[order], stacked)

    def _run(
        self,
        graphs: Sequence[nnx.GraphDef],
        states: Sequence[nnx.State],
        slots: Int[Array, ' L'],
        x: Array,
        context: Context,
        caches: Sequence[LayerCache | StateCache | None] | None = None,
    ) -> tuple[Array, list[LayerOut]]:
        """A scan over some of the repeats. One of -1 is a slot without layers: x passes it as it is."""
        runs = [rematerialised(_block_fn(graph), self.remat, context) for graph in graphs]
        first, padded = len(self.prefix), -1 in self.slots

        def one_period(x: Array, scanned: Any) -> tuple[Array, list[LayerOut]]:
            states, slot, caches = scanned
            outs: list[LayerOut] = []
            y = x
            for i, run in enumerate(runs):
                y, out = run(states[i], y, context, first + slot * len(runs) + i, caches[i])
                outs.append(out)
            return (jnp.where(slot < 0, x, y) if padded else y), outs

        caches = caches or [None] * len(runs)
        unroll = self.repeats if self.unroll == 0 else min(self.unroll, self.repeats)
        return jax.lax.scan(one_period, x, (states, slots, caches), unroll=unroll)

    def each(self, made: Callable[[Any], Any]) -> list[Any]:
        """What a function makes of each layer, in the order of `groups`, stacked where they are."""
        outs = [made(block) for block in self.prefix]
        for block in self.period:
            graph, state = nnx.split(block)
            outs.append(jax.vmap(functools.partial(_made, made, graph))(self._in_order(state)))
        return outs + [made(block) for block in self.suffix]

    def bubble(self, stages: int) -> str:
        """One line on the share of the stages' work that is not needed."""
        return pipeline.describe(self.repeats, stages, self.circles, self.microbatches)

    def groups(self) -> list[tuple[int, ...]]:
        """The layers in the order they are kept: one alone, or those that a block of the period stacks."""
        first, width, last = len(self.prefix), len(self.period), self.layers - len(self.suffix)
        stacked = [tuple(range(i, last, width)) for i in range(first, first + width)]
        return [*((i,) for i in range(first)), *stacked, *((i,) for i in range(last, self.layers))]

    def routing(self, outs: Sequence[LayerOut]) -> Routing | None:
        """The layers' routings in the order of the layers, or None where no layer has experts."""
        kept = [(layers, out.routing) for layers, out in zip(self.groups(), outs, strict=True) if out.routing]
        if not kept:
            return None
        order = np.argsort([layer for layers, _ in kept for layer in layers])
        rows = [routing if routing.loss.ndim else jax.tree.map(lambda x: x[None], routing) for _, routing in kept]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *rows)

    def cache_shapes(self) -> list[int]:
        """For each layer cache, in order: how many layers it stacks (0: a single layer, not stacked)."""
        return [0] * len(self.prefix) + [self.repeats] * len(self.period) + [0] * len(self.suffix)

    def unstacked(self) -> 'Stack':
        """The same layers one by one and not rematerialised: for decoding on a CPU and for naming a layer at fault."""
        places = [self.slots.index(repeat) for repeat in range(self.repeats)]
        middle = [_slice(block, place) for place in places for block in self.period]
        blocks = [*self.prefix, *middle, *self.suffix]
        return Stack(blocks, [], [], slots=(), remat='none', unroll=self.unroll)


def make_stack(
    make_block: Callable[[int], nnx.Module],
    layers: int,
    *,
    prefix: int = 0,
    period: int = 1,
    remat: str = 'none',
    unroll: int = 1,
    stages: int = 1,
    schedule: pipeline.Pipeline | None = None,
) -> Stack:
    """`layers` blocks from `make_block(index)`; after the prefix, blocks a period apart must be alike.

    Raises ConfigError for more stages than there are repeats of the period.
    """
    repeats, rest = divmod(layers - prefix, period)
    end = layers - rest
    schedule = schedule or pipeline.Pipeline()
    slots = pipeline.order(repeats, stages, schedule.circles if stages > 1 else 1)

    def stacked(first: int) -> nnx.Module:
        return _stacked(make_block(first), tuple(-1 if slot < 0 else first + slot * period for slot in slots))

    return Stack(
        [_at_layer(make_block(i), i) for i in range(prefix)],
        [stacked(i) for i in range(prefix, prefix + period) if repeats],
        [_at_layer(make_block(i), i) for i in range(end, layers)],
        slots=slots if repeats else (),
        remat=remat,
        unroll=unroll,
        circles=schedule.circles if stages > 1 else 1,
        microbatches=schedule.count(stages),
    )


def _block_fn(graph: nnx.GraphDef) -> Callable[..., Any]:
    def run(
        state: nnx.State, x: Array, context: Context, layer: Int[Array, ''] | int, cache: LayerCache | StateCache | None
    ) -> tuple[Array, LayerOut]:
        return nnx.merge(graph, state)(x, context, layer, cache)

    return run


def _made(made: Callable[[Any], Any], graph: nnx.GraphDef, state: nnx.State) -> Any:
    return made(nnx.merge(graph, state))


def _at_layer(block: nnx.Module, layer: int) -> nnx.Module:
    return _remake(block, lambda p: p.replace(p.get_value(), layers=(layer,)))


def _stacked(block: nnx.Module, layers: tuple[int, ...]) -> nnx.Module:
    def stack(p: nnx.Param) -> nnx.Variable:
        shape = jax.ShapeDtypeStruct((len(layers), *p.shape), p.dtype)
        return p.replace(shape, layers=layers, dims='L' + p.get_metadata('dims'))

    return _remake(block, stack)


def _slice(block: nnx.Module, index: int) -> nnx.Module:
    def take(p: nnx.Param) -> nnx.Variable:
        meta, value = p.get_metadata(), p.get_value()
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        value = jax.ShapeDtypeStruct(value.shape[1:], value.dtype) if abstract else value[index]
        return p.replace(value, layers=(meta['layers'][index],), dims=meta['dims'][1:])

    return _remake(block, take)


def _remake(block: nnx.Module, change: Callable[[nnx.Param], nnx.Variable]) -> nnx.Module:
    graph, state = nnx.split(block)
    changed = jax.tree.map(change, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graph, changed)


# ------------------------------------------------------------------------------------------------- remat


def check_remat(remat: str) -> None:
    """Raises ConfigError unless `remat` is 'none', 'full', 'dots' or names from REMAT_NAMES joined by '+', any of them
    with '@host'.
    """
    if remat in ('none', 'full', 'dots'):
        return
    names = [part.partition('@')[0] for part in remat.split('+')]
    for part in remat.split('+'):
        name, at, where = part.partition('@')
        if name not in REMAT_NAMES:
            raise ConfigError(
                f'remat {remat!r}: unknown name {name!r}{nearest(name, REMAT_NAMES)}; write none, full, dots, '
                f'or what to save joined by +: {", ".join(REMAT_NAMES)}'
            )
        if names.count(name) > 1:
            raise ConfigError(f'remat {remat!r} names {name} twice; write it once')
        if at and where != 'host':
            raise ConfigError(f'remat {remat!r}: {part!r} is to be kept in {where!r}; write {name}, or {name}@host')


def rematerialised(run: Callable[..., Any], remat: str, context: Context) -> Callable[..., Any]:
    """What the backward pass finds saved: all ('none'), a block's input ('full'), matmul results ('dots'), or names;
    `up@host` waits in the host's memory and comes back in time.
    """
    if remat == 'none' or context.cache is not None:
        return run
    return jax.checkpoint(run, policy=_policy(remat), prevent_cse=False)


def _policy(remat: str) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat in ('full', 'dots'):
        return policies.nothing_saveable if remat == 'full' else policies.dots_with_no_batch_dims_saveable
    kept = [name for name in remat.split('+') if '@' not in name]
    away = [name.removesuffix('@host') for name in remat.split('+') if '@' in name]
    if not away:
        return policies.save_only_these_names(*kept)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=away,
        offload_src='device',
        offload_dst='pinned_host',
    )

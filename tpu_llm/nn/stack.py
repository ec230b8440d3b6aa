"""The layers of a model: a prefix, a period that repeats, a suffix.

Real models are not one block repeated: Gemma-3 has 62 layers with a period of 6, DeepSeek-V3 3 dense layers and
58 with experts. The period's parameters are stacked ('L' leads their dims) and scanned, so a program's size and
compile time do not grow with depth. Whatever the grouping, weights are named and drawn by their layer's index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError, nearest
from tpu_llm.nn.attention import Context
from tpu_llm.nn.cache import LayerCache

# Tensors a remat policy may keep, by their checkpoint_name.
REMAT_NAMES = ('query', 'key', 'value', 'attended', 'gate', 'up')


class Stack(nnx.Module):
    """Layers in model order: prefix, then the blocks of `period` in turn `repeats` times, then suffix."""

    def __init__(
        self,
        prefix: Sequence[nnx.Module],
        period: Sequence[nnx.Module],
        suffix: Sequence[nnx.Module],
        *,
        repeats: int,
        remat: str,
        unroll: int,
    ):
        self.prefix = nnx.List(prefix)
        self.period = nnx.List(period)  # parameters stacked over `repeats`
        self.suffix = nnx.List(suffix)
        self.repeats = repeats
        self.layers = len(prefix) + repeats * len(period) + len(suffix)
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self, x: Float[Array, 'B T D'], context: Context
    ) -> tuple[Float[Array, 'B T D'], list[LayerCache] | None]:
        """Runs all layers. With a cache in the context, returns the layers' caches with the new keys and values."""
        caches = None if context.cache is None else context.cache.layers
        groups = iter(caches or ())
        written: list[LayerCache] = []
        for index, block in enumerate(self.prefix):
            x = self._one(block, x, context, index, next(groups, None), written)
        if self.period:
            stacked = [next(groups, None) for _ in self.period]
            x, new = self._scan(x, context, stacked)
            written += new
        for index, block in enumerate(self.suffix, self.layers - len(self.suffix)):
            x = self._one(block, x, context, index, next(groups, None), written)
        return x, None if caches is None else written

    def _one(
        self,
        block: nnx.Module,
        x: Array,
        context: Context,
        index: int,
        cache: LayerCache | None,
        written: list[LayerCache],
    ) -> Array:
        if self.remat == 'none':
            x, cache = block(x, context, index, cache)
        else:
            graph, state = nnx.split(block)
            x, cache = rematerialised(_block_fn(graph), self.remat, context)(state, x, context, index, cache)
        if cache is not None:
            written.append(cache)
        return x

    def _scan(self, x: Array, context: Context, caches: list[LayerCache | None]) -> tuple[Array, list[LayerCache]]:
        graphs, states = zip(*(nnx.split(block) for block in self.period), strict=True)
        first = len(self.prefix)
        layers = first + jnp.arange(self.repeats * len(graphs)).reshape(self.repeats, len(graphs))
        runs = [rematerialised(_block_fn(graph), self.remat, context) for graph in graphs]

        def one_period(x: Array, scanned: Any) -> tuple[Array, list[LayerCache]]:
            states, layers, caches = scanned
            new: list[LayerCache] = []
            for i, run in enumerate(runs):
                x, cache = run(states[i], x, context, layers[i], caches[i])
                if cache is not None:
                    new.append(cache)
            return x, new

        unroll = self.repeats if self.unroll == 0 else min(self.unroll, self.repeats)
        return jax.lax.scan(one_period, x, (states, layers, caches), unroll=unroll)

    def cache_shapes(self) -> list[int]:
        """For each layer cache, in order: how many layers it stacks (0: a single layer, not stacked)."""
        return [0] * len(self.prefix) + [self.repeats] * len(self.period) + [0] * len(self.suffix)

    def unstacked(self) -> 'Stack':
        """The same layers one by one and not rematerialised: for decoding on a CPU and for naming a layer at fault."""
        width = len(self.period)
        middle = [_slice(self.period[i % width], i // width) for i in range(self.repeats * width)]
        blocks = [*self.prefix, *middle, *self.suffix]
        return Stack(blocks, [], [], repeats=0, remat='none', unroll=self.unroll)


def make_stack(
    make_block: Callable[[int], nnx.Module],
    layers: int,
    *,
    prefix: int = 0,
    period: int = 1,
    remat: str = 'none',
    unroll: int = 1,
) -> Stack:
    """`layers` blocks from `make_block(index)`; after the prefix, blocks a period apart must be alike."""
    repeats, rest = divmod(layers - prefix, period)
    end = layers - rest
    return Stack(
        [_at_layer(make_block(i), i) for i in range(prefix)],
        [_stacked(make_block(i), tuple(range(i, end, period))) for i in range(prefix, prefix + period) if repeats],
        [_at_layer(make_block(i), i) for i in range(end, layers)],
        repeats=repeats,
        remat=remat,
        unroll=unroll,
    )


def _block_fn(graph: nnx.GraphDef) -> Callable[..., Any]:
    def run(
        state: nnx.State, x: Array, context: Context, layer: Int[Array, ''] | int, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        return nnx.merge(graph, state)(x, context, layer, cache)

    return run


def _at_layer(block: nnx.Module, layer: int) -> nnx.Module:
    return _remake(block, lambda p: p.replace(p.get_value(), layers=(layer,)))


def _stacked(block: nnx.Module, layers: tuple[int, ...]) -> nnx.Module:
    def stack(p: nnx.Param) -> nnx.Variable:
        shape = jax.ShapeDtypeStruct((len(layers), *p.shape), p.dtype)
        return p.replace(shape, layers=layers, dims='L' + p.get_metadata('dims'))

    return _remake(block, stack)


def _slice(block: nnx.Module, index: int) -> nnx.Module:
    def take(p: nnx.Param) -> nnx.Variable:
        meta = p.get_metadata()
        return p.replace(p.get_value()[index], layers=(meta['layers'][index],), dims=meta['dims'][1:])

    return _remake(block, take)


def _remake(block: nnx.Module, change: Callable[[nnx.Param], nnx.Variable]) -> nnx.Module:
    graph, state = nnx.split(block)
    changed = jax.tree.map(change, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graph, changed)


# ------------------------------------------------------------------------------------------------- remat


def check_remat(remat: str) -> None:
    """Raises ConfigError unless `remat` is 'none', 'full', 'dots' or names from REMAT_NAMES joined by '+'."""
    if remat in ('none', 'full', 'dots'):
        return
    for name in remat.split('+'):
        if name not in REMAT_NAMES:
            raise ConfigError(
                f'remat {remat!r}: unknown name {name!r}{nearest(name, REMAT_NAMES)}; write none, full, dots, '
                f'or what to save joined by +: {", ".join(REMAT_NAMES)}'
            )


def rematerialised(run: Callable[..., Any], remat: str, context: Context) -> Callable[..., Any]:
    """What the backward pass finds saved: all ('none'), a block's input ('full'), matmul results ('dots'), or names."""
    if remat == 'none' or context.cache is not None:
        return run
    policies = jax.checkpoint_policies
    policy = {'full': policies.nothing_saveable, 'dots': policies.dots_with_no_batch_dims_saveable}.get(remat)
    policy = policy or policies.save_only_these_names(*remat.split('+'))
    return jax.checkpoint(run, policy=policy, prevent_cse=False)

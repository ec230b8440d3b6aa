"""Whether a model's learning rate transfers: how far activations move in the first steps, at growing widths or depths.

Under a parametrisation that transfers, what a few steps change in each activation does not depend on the model's size;
elsewhere it grows or shrinks by a power of it, and the best learning rate with it. The check is cheap and needs no
sweep (Yang et al., 2022, arXiv 2203.03466, appendix D.1; over depth: Dey et al., 2025, arXiv 2505.01618, figure 7).
"""

import argparse
import collections
import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from tpu_llm import command_line
from tpu_llm.arrays import Array, Batch, Float
from tpu_llm.config import ConfigError
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.models.mup import MuPConfig
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import draw
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.schedule import Schedule
from tpu_llm.train.run import Run
from tpu_llm.train.setup import param_infos
from tpu_llm.train.state import Params

Over = Literal['width', 'layers']
# An exponent as near to 0 counts as none: over a width 8 times larger it is a factor of 1.23, and what draws and the
# least width do to a fit of four points is less. In the standard parametrisation they are a third and more.
STEADY = 0.1
Moved = dict[str, float]  # by module: how far its activations moved, the mean of their absolute change


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One parametrisation at several sizes, the first of them the base."""

    name: str
    times: tuple[int, ...]
    moved: tuple[Moved, ...]

    def exponents(self) -> dict[str, float]:
        """Of each module p, where its change goes as size^p: the slope of a line through the logarithms."""
        logs = np.log2(self.times)
        return {
            module: float(np.polyfit(logs, np.log2([each[module] for each in self.moved]), 1)[0])
            for module in self.moved[0]
        }

    def furthest(self) -> tuple[str, float]:
        """The module whose exponent is furthest from 0, and that."""
        return max(self.exponents().items(), key=lambda item: abs(item[1]))

    def table(self, over: Over) -> Table:
        table = Table(title=self.name, title_justify='left')
        table.add_column('module')
        for times in self.times:
            table.add_column(f'{over} ×{times}', justify='right')
        table.add_column('exponent', justify='right')
        for module, exponent in self.exponents().items():
            table.add_row(module, *(f'{each[module]:.3g}' for each in self.moved), f'{exponent:+.2f}')
        return table


def check(
    run: Run, *, over: Over, times: Sequence[int], steps: int, seeds: int, rows: int, length: int
) -> tuple[Check, Check]:
    """The standard parametrisation and that of `MuPConfig`, of the run's model (its base, where it has one) and
    larger ones, with the run's optimizer at its peak rate. Raises ConfigError for what is not a decoder of next tokens.
    """
    if not isinstance(run.model, DecoderConfig) or type(run.objective) is not NextToken:
        raise ConfigError(
            f'coordinates are checked on a decoder that learns next tokens; this run trains {type(run.model).__name__} '
            f'by {type(run.objective).__name__}'
        )
    if len(times) < 2 or times[0] != 1 or any(b <= a for a, b in itertools.pairwise(times)):
        raise ConfigError(f'times = {list(times)}; write at least two sizes, from 1 upwards, as in 1,2,4,8')
    if min(steps, seeds, rows, length) < 1:
        raise ConfigError(f'steps, seeds, rows and length are {steps}, {seeds}, {rows}, {length}; each is at least 1')
    given = run.model
    base, depth = (given.smaller(), given.depth) if isinstance(given, MuPConfig) else (given, 1.0)
    base = dataclasses.replace(base, dtype='float32', remat='none', dropout=None)
    grown = [larger(base, over, each) for each in times]
    batch = random_batch(base.vocab_size, rows, length)
    first = _moved(run, base, batch, steps, seeds)  # the same under both, bit for bit
    checks = []
    for name, models in (
        ('standard parametrisation', grown[1:]),
        ('muP', [MuPConfig.of(model, base, depth) for model in grown[1:]]),
    ):
        moved = [first, *(_moved(run, model, batch, steps, seeds) for model in models)]
        if over == 'layers':  # what one layer adds is meant to shrink, and what all were drawn to add to fade
            shrinks = ('.out', '.down', 'stream')
            moved = [{key: x for key, x in each.items() if not key.endswith(shrinks)} for each in moved]
        checks.append(Check(name=name, times=tuple(times), moved=tuple(moved)))
    return checks[0], checks[1]


def larger(model: DecoderConfig, over: Over, times: int) -> DecoderConfig:
    """So many times as wide, of heads as they are, or as deep."""
    model = copy.deepcopy(model)
    if over == 'layers':
        model.layers *= times
        return model
    for name in ('width', 'heads', 'kv_heads', 'mlp_width'):
        setattr(model, name, getattr(model, name) * times)
    if model.moe:
        model.moe.expert_width *= times
    if model.mla:
        model.mla.kv_rank *= times
        model.mla.query_rank *= times
    return model


def random_batch(vocab_size: int, rows: int, length: int) -> Batch:
    """Tokens that are there to be learned by heart: how far activations move does not hang on what they say."""
    ranks = 1.0 / np.arange(1, vocab_size + 1)
    tokens = np.random.default_rng(0).choice(vocab_size, (rows, length + 1), p=ranks / ranks.sum())
    ones = np.ones((rows, length), np.int32)
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
        targets=jnp.asarray(tokens[:, 1:], jnp.int32),
        weights=jnp.ones((rows, length), jnp.float32),
        segments=jnp.asarray(ones),
        positions=jnp.asarray(np.cumsum(ones, axis=1) - 1, jnp.int32),
    )


def _moved(run: Run, model: DecoderConfig, batch: Batch, steps: int, seeds: int) -> Moved:
    """By how much `steps` steps on one batch change what each module gives for it, the mean over `seeds` draws."""
    graph = ModelGraph(model.make())
    peak = run.optimizer.schedule.peak
    optimizer = dataclasses.replace(run.optimizer, schedule=Schedule(peak=peak, decay='constant'))
    tx = optimizer.make(param_infos(graph), steps)

    def loss(weights: Params, batch: Batch, count: Array) -> Array:
        total, weight, _ = run.objective(graph.bind(weights), batch, frozen=None, key=None, step=count)
        return total / weight

    def moved(seed: Any, batch: Batch) -> dict[str, Array]:
        def step(carry: tuple[Params, Any], count: Array) -> tuple[tuple[Params, Any], None]:
            weights, state = carry
            weights, state, _ = tx(jax.grad(loss)(weights, batch, count), state, weights, count, peak)
            return (weights, state), None

        drawn = draw(graph.leaves, seed)
        (learned, _), _ = jax.lax.scan(step, (drawn, tx.init(drawn)), jnp.arange(steps))
        return changes(graph, drawn, learned, batch)

    each = jax.jit(moved)
    by_seed = [each(run.seed + seed, batch) for seed in range(seeds)]
    mean = {name: float(np.mean([values[name] for values in by_seed])) for name in by_seed[0]}
    if not all(map(math.isfinite, mean.values())):
        raise ConfigError(
            f'the model of width {model.width} and {model.layers} layers diverged at learning rate {peak:g}; lower it: '
            f'--config.optimizer.schedule.peak={peak / 4:g}'
        )
    return mean


def changes(graph: ModelGraph, drawn: Params, learned: Params, batch: Batch) -> dict[str, Float[Array, '']]:
    """How far each module's activations lie apart under two sets of weights; of the head, only what it has learned.

    The logits of the head as it was drawn fade with the width, and are meant to (table 8 of the paper): they would hide
    the others.
    """
    before, after = (activations(graph, weights, batch) for weights in (drawn, learned))
    moved = {name: jnp.abs(after[name] - before[name]).mean() for name in before if name != 'hidden'}
    heads = [graph.bind(weights).unembedding() for weights in (learned, drawn)]
    return moved | {'head': jnp.abs(jnp.einsum('ZBTD,DV->BTV', after['hidden'], heads[0] - heads[1])).mean()}


def activations(graph: ModelGraph, weights: Params, batch: Batch) -> dict[str, Float[Array, '_ B T ...']]:
    """What the embedding and each kind of linear map of the layers give, the stream behind the last layer, and what the
    head takes; their first dim is of layers, or 1.
    """
    model = graph.bind(weights).unstacked()
    heard: dict[str, list[Array]] = collections.defaultdict(list)
    heard['embed'].append(model.embed(batch.tokens, jnp.dtype(model.dtype)))
    for block in model.stack.prefix:
        for parent, name, path in list(_maps(block)):
            setattr(parent, name, _Heard(getattr(parent, name), heard[path].append))
    norm, model.norm = model.norm, None
    stream = model.hidden(batch.tokens, segments=batch.segments, positions=batch.positions)
    heard['stream'].append(stream)
    heard['hidden'].append(stream if norm is None else norm(stream))
    return {path: jnp.stack(values) for path, values in heard.items()}


class _Heard(nnx.Module):
    """A map that tells what it gives."""

    def __init__(self, inner: Einsum, tell: Callable[[Array], None]):
        self.inner = inner
        self.tell = tell

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        y = self.inner(x)
        self.tell(y)
        return y


def _maps(block: nnx.Module) -> Iterator[tuple[Any, str, str]]:
    """Its linear maps of tokens to what grows: the module that holds each, under what name, and its path in the layer.

    Routers give as many numbers whatever the width, so what they were drawn to give fades as the head's does; and
    experts take tokens sorted. What both do is in the stream.
    """
    modules = {tuple(map(str, path)): module for path, module in nnx.iter_modules(block)}
    for path, module in modules.items():
        if type(module) is Einsum and module.spec.startswith('BT') and not module.spec.endswith(('BTE', 'BTY')):
            yield modules[path[:-1]], path[-1], '.'.join(path)


# ------------------------------------------------------------------------------------------------------- the command


def add_coordinates(parser: argparse.ArgumentParser) -> None:
    """whether learning rates transfer: how far activations move in a few steps, at growing widths or depths"""
    parser.add_argument('--config', required=True, help='FILE.py or FILE.py:arg; its model is the smallest')
    parser.add_argument('--over', choices=('width', 'layers'), default='width', help='what grows')
    parser.add_argument('--times', default='1,2,4,8', help='how many times the smallest; default 1,2,4,8')
    parser.add_argument('--steps', type=int, default=5, help='default 5')
    parser.add_argument('--seeds', type=int, default=3, help='draws of each model; default 3')
    parser.add_argument('--rows', type=int, default=8, help='of the one batch; default 8')
    parser.add_argument('--length', type=int, default=32, help='tokens of a row; default 32')


def coordinates(options: argparse.Namespace) -> int:
    """Prints both tables; 1 where under muP something still grows or shrinks with the size."""
    run = command_line.load(options.config, options.rest)
    try:
        times = [int(each) for each in options.times.split(',')]
    except ValueError:
        raise ConfigError(f'--times={options.times}; write whole numbers, as in 1,2,4,8') from None
    standard, mup = check(
        run,
        over=options.over,
        times=times,
        steps=options.steps,
        seeds=options.seeds,
        rows=options.rows,
        length=options.length,
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for each in (standard, mup):
        console.print(each.table(options.over))
    for each in (standard, mup):
        module, exponent = each.furthest()
        console.print(f'{each.name}: furthest from 0 is {module} with {options.over}^{exponent:+.2f}')
    return int(abs(mup.furthest()[1]) > STEADY)

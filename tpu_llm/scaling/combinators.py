"""The points of a sweep: dicts of values, made by product, zip, chain and at random, and a name for each.

    for point in product(zip_(width=[64, 128], heads=[2, 4]), rate=[1e-3, 3e-3]):
        run = base()
        run.model.width, run.model.heads = point['width'], point['heads']
        run.optimizer.schedule.peak = point['rate']
        yield name(point), run

A combinator gives an iterator; where points are to be gone through twice, make a list of them.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError, is_config

Point = dict[str, Any]


def product(*points: Iterable[Point], **values: Iterable[Any]) -> Iterator[Point]:
    """Every combination of the points of each argument and the values of each name; the last turns fastest."""
    lists = [list(each) for each in points] + [[{key: value} for value in each] for key, each in values.items()]
    for parts in itertools.product(*lists):
        yield _joined(parts)


def zip_(*points: Iterable[Point], **values: Iterable[Any]) -> Iterator[Point]:
    """The first of each together, then the second of each … Raises ConfigError where they are not equally many."""
    lists = [list(each) for each in points] + [[{key: value} for value in each] for key, each in values.items()]
    sizes = [len(each) for each in lists]
    if len(set(sizes)) > 1:
        raise ConfigError(f'zip_ was given {", ".join(map(str, sizes))} values; give equally many of each')
    for parts in zip(*lists, strict=True):
        yield _joined(parts)


def chain(*points: Iterable[Point]) -> Iterator[Point]:
    """The points of the first argument, then those of the second …"""
    return itertools.chain(*points)


def _joined(parts: Iterable[Point]) -> Point:
    point: Point = {}
    for part in parts:
        if both := point.keys() & part.keys():
            raise ConfigError(f'{sorted(both)[0]!r} is given twice in one point; take it out of one of them')
        point |= part
    return point


# ------------------------------------------------------------------------------------------------------ at random

_DIGITS = 3  # a drawn number has so many, and no more are in its run's name


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Something to draw from."""

    draw: Callable[[np.random.Generator], Any]


def uniform(low: float, high: float) -> Range:
    """A number from low to high."""
    return Range(lambda random: _rounded(random.uniform(low, high)))


def log_uniform(low: float, high: float) -> Range:
    """A number from low to high, each factor of ten as likely as the others."""
    if not 0 < low <= high:
        raise ConfigError(f'log_uniform({low}, {high}): write 0 < low <= high')
    return Range(lambda random: _rounded(math.exp(random.uniform(math.log(low), math.log(high)))))


def integers(low: int, high: int) -> Range:
    """A whole number from low to high, both included."""
    return Range(lambda random: int(random.integers(low, high, endpoint=True)))


def random(count: int, seed: int = 0, **values: Range | Sequence[Any]) -> Iterator[Point]:
    """`count` points, each value drawn from a range or from a list, independently.

    Point i is the same whatever `count` is, and so is a value whatever other names there are: a sweep that is made
    longer keeps the runs that it has.
    """
    if count < 1:
        raise ConfigError(f'random was asked for {count} points; 1 or more')
    for i in range(count):
        yield {key: _drawn(each, np.random.default_rng([seed, i, *key.encode()])) for key, each in values.items()}


def _drawn(values: Range | Sequence[Any], random: np.random.Generator) -> Any:
    if isinstance(values, Range):
        return values.draw(random)
    return values[int(random.integers(len(values)))]


def _rounded(number: float) -> float:
    return float(f'{number:.{_DIGITS}g}')


# ----------------------------------------------------------------------------------------------------------- names


def name(point: Point) -> str:
    """`rate=0.001,width=64`: a folder's name for a point.

    A config is named by its type, a tuple by its items (`0.9x0.95`). Raises ConfigError for text that is no folder's.
    """
    if not point:
        raise ConfigError('a point without values has no name; write one')
    return ','.join(f'{key}={_word(key, value)}' for key, value in point.items())


def _word(key: str, value: Any) -> str:
    if is_config(value):
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return 'x'.join(_word(key, item) for item in value)
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e6:
        return f'{value:.15g}'.replace('+', '')  # 1e15
    text = str(value)
    if not re.fullmatch(r'[\w.-]+', text):
        raise ConfigError(f'{key} = {text!r} cannot be part of a folder’s name; name this run yourself')
    return text

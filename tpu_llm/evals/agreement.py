"""How far a judge agrees with people: agreement, Cohen's kappa and Spearman's correlation, each with its interval.

Every figure is a function of how often each pair of (label, verdict) occurs. A resample of the items is another such
count, so the bootstrap draws counts and never touches an item again.
"""

import argparse
import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.evals.intervals import LEVEL, Estimate, resampled
from tpu_llm.evals.records import read, value_of

Value = float | str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """A figure is NaN where it has no value: kappa where all is one value, Spearman where a side is or is no number."""

    items: int  # that have a label and a verdict
    without: int  # items for which the judge gave no verdict; they count in nothing below
    agreement: Estimate  # share of items with verdict = label
    kappa: Estimate  # Cohen (1960): agreement beyond chance
    linear: Estimate  # weighted kappa (Cohen, 1968): a disagreement counts by its distance …
    quadratic: Estimate  # … or the square of it
    spearman: Estimate  # correlation of ranks


def measure(
    labels: Sequence[Any], verdicts: Sequence[Any], *, draws: int = 1000, level: float = LEVEL, seed: int = 0
) -> Agreement:
    """People's labels against a judge's verdicts, item by item; a verdict of None is none.

    Both are numbers, or both texts (or truths), which have neither distance nor order. Raises ConfigError for a mix,
    and for fewer than two items.
    """
    if draws < 1:
        raise ConfigError(f'draws is {draws}; it is at least 1')
    pairs = [(_value(a), _value(b)) for a, b in zip(labels, verdicts, strict=True) if b is not None]
    if len(pairs) < 2:
        raise ConfigError(f'{len(pairs)} of {len(labels)} items have a verdict; agreement takes at least 2')
    kinds = {type(value) for pair in pairs for value in pair}
    if len(kinds) > 1:
        some = {type(value): value for pair in pairs for value in pair}
        raise ConfigError(
            f'labels and verdicts are numbers and texts ({some[float]:g} and {some[str]!r}); write both alike'
        )
    counts = _Counts(pairs)
    random, found = np.random.default_rng(seed), counts.figures(counts.seen)
    again = random.multinomial(len(pairs), counts.seen / len(pairs), size=draws)
    figures = np.array([counts.figures(row) for row in again]).reshape(draws, len(found))
    estimates = [resampled(value, figures[:, at], level) for at, value in enumerate(found)]
    names = ('agreement', 'kappa', 'linear', 'quadratic', 'spearman')
    return Agreement(items=len(pairs), without=len(labels) - len(pairs), **dict(zip(names, estimates, strict=True)))


class _Counts:
    """Pairs of values that occur, and how often; a pair is two places in the sorted values."""

    def __init__(self, pairs: Sequence[tuple[Value, Value]]):
        counter = collections.Counter(pairs)
        values: list[Any] = sorted({value for pair in pairs for value in pair})
        place = {value: at for at, value in enumerate(values)}
        self.size = len(values)
        self.numbers = np.asarray(values, np.float64) if isinstance(values[0], float) else None
        self.first = np.array([place[a] for a, _ in counter])
        self.second = np.array([place[b] for _, b in counter])
        self.seen = np.array(list(counter.values()), np.float64)

    def figures(self, seen: np.ndarray) -> tuple[float, float, float, float, float]:
        total = seen.sum()
        p, q = (np.bincount(side, seen, self.size) / total for side in (self.first, self.second))
        weights = seen / total
        same = float(weights[self.first == self.second].sum())
        kappa = _beyond_chance(1 - same, 1 - float(p @ q))
        if self.numbers is None:
            return same, kappa, math.nan, math.nan, math.nan
        x, y = self.numbers[self.first], self.numbers[self.second]
        # Of independent X and Y: E|X − Y| = ∫ F(1 − G) + G(1 − F), and E(X − Y)² from moments.
        f, g = np.cumsum(p)[:-1], np.cumsum(q)[:-1]
        apart = float((f * (1 - g) + g * (1 - f)) @ np.diff(self.numbers))
        squared = float(p @ self.numbers**2 + q @ self.numbers**2 - 2 * (p @ self.numbers) * (q @ self.numbers))
        linear = _beyond_chance(float(weights @ abs(x - y)), apart)
        quadratic = _beyond_chance(float(weights @ (x - y) ** 2), squared)
        ranks = [(np.cumsum(side) - side / 2)[places] for side, places in ((p, self.first), (q, self.second))]
        return same, kappa, linear, quadratic, _correlation(ranks[0], ranks[1], weights)


def _beyond_chance(observed: float, expected: float) -> float:
    """1 − observed disagreement / that of independent raters with the same marginals."""
    return 1 - observed / expected if expected > 1e-12 else math.nan


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    x, y = x - weights @ x, y - weights @ y
    size = math.sqrt(float(weights @ x**2) * float(weights @ y**2))
    return float(weights @ (x * y)) / size if size > 1e-12 else math.nan


def _value(value: Any) -> Value:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else float(value)


# ------------------------------------------------------------------------------------------------------ command line


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', help='JSONL: an item a line, with its label and its verdict (null: none was given)')
    parser.add_argument('--label', default='label', help="the field of people's verdict (%(default)s)")
    parser.add_argument('--verdict', default='verdict', help="the field of the judge's (%(default)s)")
    parser.add_argument('--by', default='', help='a field that tells judges apart: a row of figures for each')
    parser.add_argument('--draws', type=int, default=1000, help='resamples of the bootstrap (%(default)s)')
    parser.add_argument('--json', action='store_true', help='figures as JSON')


def run(options: argparse.Namespace) -> None:
    """Raises ConfigError, naming the line, for what is no item."""
    judges: dict[str, tuple[list[Any], list[Any]]] = {}
    for where, record in read(options.file):
        judge = str(value_of(record, options.by, where)) if options.by else 'all'
        labels, verdicts = judges.setdefault(judge, ([], []))
        labels.append(_label(value_of(record, options.label, where), options.label, where))
        if options.verdict not in record and 'winner' in record:
            raise ConfigError(f'{where} has no {options.verdict!r} but a winner, as pairs have; add --verdict=winner')
        verdict = value_of(record, options.verdict, where)
        verdicts.append(None if verdict is None else _label(verdict, options.verdict, where))
    found = {judge: measure(*given, draws=options.draws) for judge, given in judges.items()}
    if options.json:
        print(json.dumps({judge: _plain(dataclasses.asdict(each)) for judge, each in found.items()}, indent=2))
        return
    for judge, each in found.items():
        without = f', {each.without:,} without a verdict left out' if each.without else ''
        print(f'{judge}: {each.items:,} items{without}' if options.by else f'{each.items:,} items{without}')
        print('\n'.join(lines(each)))


def lines(found: Agreement) -> list[str]:
    """The figures that have a value, for a terminal."""
    estimates = {title: getattr(found, name) for name, title in _TITLES.items()}
    return [f'  {title:24} {each}' for title, each in estimates.items() if not math.isnan(each.value)]


_TITLES = {
    'agreement': 'agreement',
    'kappa': "Cohen's kappa",
    'linear': 'kappa, linear weights',
    'quadratic': 'kappa, quadratic weights',
    'spearman': 'Spearman',
}


def _label(value: Any, field: str, where: str) -> Any:
    if isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    raise ConfigError(f'{where}: {field} is {value!r}; write a number, a text or a truth')


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

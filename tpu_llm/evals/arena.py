"""Ratings from battles: who beats whom, on one scale, with intervals (Bradley and Terry, 1952, on the scale of Elo).

A model of rating r beats one of rating s with probability 1 / (1 + 10^((s − r) / 400)); a tie is half a win for each.
Ratings are the likeliest ones, so they do not depend on the order of battles, as Elo's updates do.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special
from scipy.sparse import csgraph

from tpu_llm.config import ConfigError
from tpu_llm.evals.intervals import LEVEL, Estimate, resampled
from tpu_llm.evals.records import read, value_of

SCALE = 400 / math.log(10)  # points of rating in a unit of log odds
MEAN = 1000.0  # rating of the models on an island, in the mean
_STEPS = 100  # of Newton's method, which takes five to ten


@dataclasses.dataclass(frozen=True, slots=True)
class Battle:
    """One comparison of two models; `score` is what `a` won: 1, 0, or 0.5 for a tie."""

    a: str
    b: str
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """±inf for a model that is above or below all that decide the scale, as `ratings_of` has it."""

    model: str
    rating: Estimate
    rank: int  # 1 + how many of its island are surely better: their interval lies above this one's
    battles: int
    points: float  # a win is 1, a tie 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ratings:
    islands: tuple[
        tuple[Rating, ...], ...
    ]  # models that are connected by battles, best first; the largest island first
    warnings: tuple[str, ...]


def rate(battles: Iterable[Battle], *, draws: int = 1000, level: float = LEVEL, seed: int = 0) -> Ratings:
    """Ratings of all models that fought, with the intervals of a bootstrap over battles.

    Models that no chain of battles connects have no common scale: each such island is rated by itself, and warned of.
    Raises ConfigError for no battle, or one of a model against itself.
    """
    given = list(battles)
    if not given:
        raise ConfigError('there is no battle; give at least one')
    if draws < 1:
        raise ConfigError(f'draws is {draws}; it is at least 1')
    for each in given:
        if each.a == each.b:
            raise ConfigError(f'{each.a!r} fights itself; name two models')
    names = sorted({name for each in given for name in (each.a, each.b)})
    place = {name: at for at, name in enumerate(names)}
    points = np.zeros((len(names), len(names)))
    for each in given:
        points[place[each.a], place[each.b]] += each.score
        points[place[each.b], place[each.a]] += 1 - each.score
    count, of = csgraph.connected_components(points, directed=False)
    met = points.sum(axis=0) + points.sum(axis=1)
    order = sorted(range(count), key=lambda island: (-int((of == island).sum()), -met[of == island].sum()))
    islands, warnings = [], []
    if count > 1:
        listed = '; '.join(', '.join(names[at] for at in np.flatnonzero(of == island)) for island in order)
        warnings.append(f'no battle connects these {count} islands, and ratings compare only within one: {listed}')
    for island in order:
        members = np.flatnonzero(of == island)
        own = [names[at] for at in members]
        own_battles = [each for each in given if each.a in set(own)]
        islands.append(_island(own, own_battles, points[np.ix_(members, members)], draws, level, seed))
        warnings += _unbounded(islands[-1])
    return Ratings(islands=tuple(islands), warnings=tuple(warnings))


def _island(
    names: Sequence[str], battles: Sequence[Battle], points: np.ndarray, draws: int, level: float, seed: int
) -> tuple[Rating, ...]:
    found = ratings_of(points)
    again = np.array([_beside(ratings_of(each), found) for each in _resamples(names, battles, draws, seed)])
    estimates = [resampled(float(found[at]), again[:, at], level) for at in range(len(names))]
    met = points + points.T
    rated = [
        Rating(
            model=name,
            rating=estimates[at],
            rank=1 + sum(other.low > estimates[at].high for other in estimates),
            battles=round(met[at].sum()),
            points=float(points[at].sum()),
        )
        for at, name in enumerate(names)
    ]
    return tuple(sorted(rated, key=lambda each: (-np.nan_to_num(each.rating.value, nan=-np.inf), each.model)))


def _beside(drawn: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A resample's ratings, moved to those that were found: what became infinite in it must not shift the rest."""
    both = np.isfinite(drawn) & np.isfinite(found)
    return drawn + (found[both] - drawn[both]).mean() if both.any() else drawn


def _resamples(names: Sequence[str], battles: Sequence[Battle], draws: int, seed: int) -> Iterable[np.ndarray]:
    """`points` of as many battles, drawn from these with replacement: counts of each kind of battle are enough."""
    place = {name: at for at, name in enumerate(names)}
    kinds, seen = np.unique(
        [(place[each.a], place[each.b], each.score) for each in battles], axis=0, return_counts=True
    )
    a, b, score = kinds[:, 0].astype(int), kinds[:, 1].astype(int), kinds[:, 2]
    random = np.random.default_rng(seed)
    for _ in range(draws):
        times = random.multinomial(len(battles), seen / len(battles))
        points = np.zeros((len(names), len(names)))
        np.add.at(points, (a, b), times * score)
        np.add.at(points, (b, a), times * (1 - score))
        yield points


def ratings_of(points: np.ndarray) -> np.ndarray:
    """float64[M] from `points[i, j]`, what i won against j.

    The likeliest ratings are finite where every model can be reached from every other by going from loser to winner
    (Ford, 1957). Otherwise the largest set of models of which that is true decides the scale, with mean 1000; a model
    that can be reached from it is +inf, one from which it can be reached −inf, and else NaN: not comparable.
    """
    count, of = csgraph.connected_components(points, connection='strong')
    met = points.sum(axis=0) + points.sum(axis=1)
    main = max(range(count), key=lambda part: ((of == part).sum(), met[of == part].sum()))
    inside = of == main
    start = int(np.flatnonzero(inside)[0])
    ratings = np.full(len(points), np.nan)
    for beaten, value in ((points.T, np.inf), (points, -np.inf)):
        ratings[csgraph.breadth_first_order(beaten, start, return_predecessors=False)] = value
    ratings[inside] = MEAN + SCALE * _log_odds(points[np.ix_(inside, inside)])
    return ratings


def _log_odds(points: np.ndarray) -> np.ndarray:
    """The maximum of the likelihood, with mean 0, by Newton's method; a step that does not improve it is halved."""
    count = len(points)
    met, won = points + points.T, points.sum(axis=1)
    odds = np.zeros(count)

    def loss(odds: np.ndarray) -> float:
        return float((points * np.logaddexp(0.0, odds[None, :] - odds[:, None])).sum())

    best = loss(odds)
    for _ in range(_STEPS):
        wins = special.expit(odds[:, None] - odds[None, :])
        gradient = won - (met * wins).sum(axis=1)
        if abs(gradient).max() <= 1e-10 * max(1.0, met.max()):
            break
        spread = met * wins * wins.T
        # Ratings may all be moved by one constant: the last term holds their mean at 0.
        curvature = np.diag(spread.sum(axis=1)) - spread + spread.mean()
        step = np.linalg.solve(curvature, gradient)
        while (value := loss(odds + step)) > best and abs(step).max() > 1e-12:
            step = step / 2
        odds, best = odds + step, min(value, best)
    return odds - odds.mean()


def _unbounded(island: Sequence[Rating]) -> list[str]:
    """A word on the models whose rating or interval is infinite, or that have no place."""
    said = []
    for value, what in ((np.inf, 'lost or tied'), (-np.inf, 'won or tied')):
        if names := [each.model for each in island if each.rating.value == value]:
            others = 'below' if value > 0 else 'above'
            said.append(
                f'{", ".join(names)}: {what} no battle with the models {others}, so no finite rating is the likeliest; '
                'more battles may give one'
            )
    if names := [each.model for each in island if math.isnan(each.rating.value)]:
        said.append(f'{", ".join(names)}: has no place among the others yet; more battles may give it one')
    bounds = [(each.model, each.rating.low, each.rating.high) for each in island if math.isfinite(each.rating.value)]
    if names := [name for name, *ends in bounds if any(map(math.isinf, ends))]:
        said.append(
            f'{", ".join(names)}: in some resamples no finite rating is the likeliest, so the interval reaches to -inf '
            'or inf; more battles narrow it'
        )
    return said


# ------------------------------------------------------------------------------------------------------ command line

_WINNERS = {'a': 1.0, 'b': 0.0, 'tie': 0.5}


def arguments(parser: argparse.ArgumentParser) -> None:
    battle = '{"a": model, "b": model, "winner": "a", "b" or "tie"}'
    parser.add_argument('files', nargs='+', metavar='file', help=f'JSONL: a battle a line, {battle}')
    parser.add_argument('--draws', type=int, default=1000, help='resamples of the bootstrap (%(default)s)')
    parser.add_argument('--json', action='store_true', help='ratings as JSON')


def run(options: argparse.Namespace) -> None:
    """Raises ConfigError, naming the line, for what is no battle."""
    battles, without = [], 0
    for where, record in itertools.chain.from_iterable(map(read, options.files)):
        battle = _battle(record, where)
        battles += [battle] if battle else []
        without += battle is None
    if not battles:
        raise ConfigError(f'{", ".join(options.files)}: none of the {without} battles has a winner')
    found = rate(battles, draws=options.draws)
    if options.json:
        print(json.dumps(_json(found, len(battles), without), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    left_out = f', {without:,} without a verdict left out' if without else ''
    console.print(f'{len(battles):,} battles{left_out}')
    for island in found.islands:
        console.print(_table(island))
    for warning in found.warnings:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f'warning: {warning}', markup=False)


def _battle(record: dict[str, Any], where: str) -> Battle | None:
    """None for a battle of which the judge said nothing: `winner` is null."""
    a, b, winner = (value_of(record, field, where) for field in ('a', 'b', 'winner'))
    for field, name in (('a', a), ('b', b)):
        if not isinstance(name, str) or not name:
            raise ConfigError(f'{where}: {field} is {name!r}; write the name of a model')
    if a == b:
        raise ConfigError(f'{where}: {a!r} fights itself; name two models')
    if winner is None:
        return None
    if winner not in _WINNERS:
        raise ConfigError(f"{where}: winner is {winner!r}; write 'a', 'b', 'tie', or null for no verdict")
    return Battle(a, b, _WINNERS[winner])


def _table(island: Sequence[Rating]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ('rank', 'model', 'rating', '95% interval', 'battles', 'points'):
        table.add_column(column, justify='left' if column == 'model' else 'right')
    for each in island:
        value, low, high = (f'{bound:,.0f}' for bound in dataclasses.astuple(each.rating))
        table.add_row(str(each.rank), each.model, value, f'{low} – {high}', f'{each.battles:,}', f'{each.points:,.1f}')
    return table


def _json(found: Ratings, battles: int, without: int) -> dict[str, Any]:
    """JSON has no infinity: such bounds are written 'inf' and '-inf'."""

    def plain(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    def row(each: Rating) -> dict[str, Any]:
        bounds = {name: plain(bound) for name, bound in dataclasses.asdict(each.rating).items()}
        told = {'model': each.model, 'rating': bounds.pop('value'), **bounds, 'rank': each.rank}
        return {**told, 'battles': each.battles, 'points': each.points}

    islands = [[row(each) for each in island] for island in found.islands]
    return {'battles': battles, 'without': without, 'islands': islands, 'warnings': list(found.warnings)}

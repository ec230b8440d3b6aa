"""IsoFLOP profiles: a parabola through the losses of one budget, and how their minima move (approach 2).

Hoffmann et al. (2022, arXiv 2203.15556, section 3.2) fit the loss of the runs of one budget as a parabola of ln N, and
the sizes at the minima as a power of the budget. Intervals are of residuals drawn anew: a valley of a few runs says
little of its noise, so that of all valleys is pooled. Far from its minimum a valley is no parabola: it is steeper on
the side of large models, which see few tokens. So only runs near the least loss count.
"""

import dataclasses

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import Estimate, estimate
from tpu_llm.scaling.points import Points

_LEAST = 3  # sizes; a parabola has three numbers
_NEAR = 0.1  # how far above the least loss of its budget a run may be to count
_KEPT = 4  # sizes that count however far they are: one more than the numbers of a parabola, so that it may be missed
_WIDEST = 1.5  # the most FLOPs of a budget over the least
_FAR = 20.0  # a bootstrap whose valley is nearly flat has its minimum anywhere: at most this far, in ln N


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Valley:
    """The runs of one budget, and those `near` the least loss, which the parabola of ln N goes through.

    `curve` is that, highest power first.
    `problem` says why the minimum is not to be used: there is none, or it is at the edge of the sizes.
    """

    flops: float
    runs: Points
    near: Points
    curve: np.ndarray
    parameters: Estimate
    tokens: Estimate
    loss: Estimate
    problem: str

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        return np.polyval(self.curve, np.log(parameters))


@dataclasses.dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = scale · C^power."""

    scale: Estimate
    power: Estimate

    def __call__(self, flops: float) -> float:
        return self.scale.value * flops**self.power.value


@dataclasses.dataclass(frozen=True, slots=True)
class Profiles:
    valleys: tuple[Valley, ...]
    parameters: PowerLaw | None  # of the compute-optimal size; None with fewer than two valleys that can be used
    tokens: PowerLaw | None
    warnings: tuple[str, ...]


def budgets(runs: Points, within: float = 0.15) -> list[Points]:
    """The runs by budget, ascending: those whose budgets follow each other by less than this share."""
    order = np.argsort(runs.budget, kind='stable')
    gaps = np.diff(np.log(runs.budget[order])) > np.log1p(within)
    return [runs.take(part) for part in np.split(order, np.flatnonzero(gaps) + 1)]


def profiles(runs: Points, *, bootstraps: int = 1000, seed: int = 0) -> Profiles:
    """Valleys of every budget that has three sizes or more, and the power laws of their minima.

    Raises ConfigError where there is no such budget.
    """
    groups, warnings = _groups(runs)
    near = [_near(group) for group in groups]
    noise = _pooled(near)
    generator = np.random.default_rng(seed)
    made = [_valley(*both, noise, generator, bootstraps) for both in zip(groups, near, strict=True)]
    usable = [(valley, minima) for valley, minima in made if not valley.problem]
    valleys = tuple(valley for valley, _ in made)
    warnings += [f'budget {valley.flops:.3g}: {valley.problem}' for valley in valleys if valley.problem]
    if len(usable) < 2:
        warnings.append(f'{len(usable)} valleys can be used; a power law of the budget needs at least 2')
        return Profiles(valleys, None, None, tuple(warnings))
    flops = np.log([valley.flops for valley, _ in usable])
    sizes = np.stack([minima for _, minima in usable])  # ln N: the fit, then the bootstraps
    # Tokens of a minimum are of its own budget; the FLOPs of a parameter and token hardly change within a valley.
    tokens = np.stack([_tokens(valley.near, size) for (valley, _), size in zip(usable, sizes, strict=True)])
    return Profiles(valleys, _power_law(flops, sizes), _power_law(flops, tokens), tuple(warnings))


def _groups(runs: Points) -> tuple[list[Points], list[str]]:
    """The budgets with sizes enough for a valley, and why others have none."""
    found, warnings = [], []
    for group in budgets(runs):
        least, most = group.budget.min(), group.budget.max()
        if most > _WIDEST * least:
            warnings.append(
                f'{len(group)} runs from {least:.3g} to {most:.3g} FLOPs follow each other without a gap, so they are '
                'no budget; name a column that tells: --columns budget=…'
            )
        else:
            found.append(group)
    sizes = [len(np.unique(group.parameters)) for group in found]
    if max(sizes, default=0) < _LEAST:
        raise ConfigError(
            f'a valley needs at least {_LEAST} finished runs of different sizes and one budget; the budget with most '
            f'has {max(sizes, default=0)}; run more sizes for the same FLOPs'
            + ''.join(f' ({line})' for line in warnings)
        )
    for group, size in zip(found, sizes, strict=True):
        if size < _LEAST:
            has = 'has 1 size' if size == 1 else f'has {size} sizes'
            warnings.append(f'budget {_flops(group):.3g}: it {has}, and a valley needs {_LEAST}; it is left out')
    return [group for group, size in zip(found, sizes, strict=True) if size >= _LEAST], warnings


def _flops(group: Points) -> float:
    return float(np.exp(np.log(group.flops).mean()))


def _near(runs: Points) -> Points:
    """Those of nearly the least loss, and at least four sizes if there are."""
    order = np.argsort(runs.loss, kind='stable')
    sizes = [len(np.unique(runs.parameters[order[: i + 1]])) for i in range(len(order))]
    enough = int(np.argmax(np.array(sizes) >= min(_KEPT, max(sizes)))) + 1
    close = int(np.sum(runs.loss <= (1 + _NEAR) * runs.loss.min()))
    return runs.take(np.sort(order[: max(enough, close)]))


def _pooled(groups: list[Points]) -> np.ndarray:
    """Residuals of all valleys, each scaled up for the three numbers fitted to it; empty if there are none."""
    found = []
    for group in groups:
        free = len(group) - _LEAST
        if free:
            x, y = np.log(group.parameters), group.loss
            found.append((y - _map(x) @ y) * np.sqrt(len(group) / free))
    return np.concatenate(found) if found else np.empty(0)


def _map(x: np.ndarray) -> np.ndarray:
    """[n, n]: takes losses to the parabola's values at the same x."""
    design = np.vander(x - x.mean(), 3)
    return design @ np.linalg.pinv(design)


def _valley(
    group: Points, runs: Points, noise: np.ndarray, generator: np.random.Generator, bootstraps: int
) -> tuple[Valley, np.ndarray]:
    """The valley, and ln N of its minimum: the fit's, then each bootstrap's (NaN where that does not bend up)."""
    x = np.log(runs.parameters)
    centre = x.mean()
    solve = np.linalg.pinv(np.vander(x - centre, 3))
    losses = runs.loss[None]
    if len(noise) and bootstraps:
        smooth = (np.vander(x - centre, 3) @ (solve @ runs.loss))[None]
        losses = np.concatenate([losses, smooth + generator.choice(noise, (bootstraps, len(runs)))])
    bend, slope, level = np.einsum('pn,bn->pb', solve, losses)
    with np.errstate(divide='ignore', invalid='ignore'):
        minima = np.where(bend > 0, centre + np.clip(-slope / (2 * bend), -_FAR, _FAR), np.nan)
        depths = np.where(bend > 0, level - slope**2 / (4 * bend), np.nan)
    tokens = np.exp(_tokens(runs, minima))
    curve = np.polyval(np.poly1d([bend[0], slope[0], level[0]]), np.poly1d([1.0, -centre]))
    valley = Valley(
        flops=_flops(group),
        runs=group,
        near=runs,
        curve=np.asarray(curve),
        parameters=estimate(np.exp(minima[0]), np.exp(minima[1:])),
        tokens=estimate(tokens[0], tokens[1:]),
        loss=estimate(depths[0], depths[1:]),
        problem=_problem(bend[0], minima[0], group),
    )
    return valley, minima


def _problem(bend: float, minimum: float, runs: Points) -> str:
    """Runs on both sides must lie higher than the one of least loss: a parabola's minimum alone is no proof."""
    least, most = runs.parameters.min(), runs.parameters.max()
    lowest = runs.parameters[np.argmin(runs.loss)]
    if bend <= 0:
        return 'the losses near its least do not bend up, so there is no minimum; it is left out'
    if lowest == least or minimum <= np.log(least):
        return f'its minimum is at the edge: the smallest size, {least:.4g}; it is left out: run smaller models'
    if lowest == most or minimum >= np.log(most):
        return f'its minimum is at the edge: the largest size, {most:.4g}; it is left out: run larger models'
    return ''


def _tokens(runs: Points, log_size: np.ndarray) -> np.ndarray:
    """ln D of the budget at sizes near those that ran: ln(C / D) is close to a line in ln N."""
    x, cost = np.log(runs.parameters), np.log(runs.flops / runs.tokens)
    slope, level = np.polyfit(x - x.mean(), cost, 1)
    return np.log(runs.flops).mean() - level - slope * (log_size - x.mean())


def _power_law(log_flops: np.ndarray, log_values: np.ndarray) -> PowerLaw:
    """By least squares of logarithms, through the fit's values (column 0) and each bootstrap's."""
    centred = log_flops - log_flops.mean()
    power = np.einsum('v,vb->b', centred, log_values) / np.sum(centred**2)
    scale = np.exp(log_values.mean(0) - power * log_flops.mean())
    return PowerLaw(estimate(scale[0], scale[1:]), estimate(power[0], power[1:]))

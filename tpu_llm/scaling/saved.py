"""A fit as JSON, so that what is found once can be asked later: how a budget is best spent, what serving changes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError, nearest
from tpu_llm.scaling.allocate import exponents
from tpu_llm.scaling.fit import Fit, quantiles
from tpu_llm.scaling.laws import Chinchilla, Kaplan, Law, Repeats
from tpu_llm.scaling.points import Points
from tpu_llm.scaling.valleys import PowerLaw, Profiles

LAWS = {'chinchilla': Chinchilla, 'kaplan': Kaplan, 'repeats': Repeats}


def name_of(law: Law) -> str:
    return next(name for name, kind in LAWS.items() if isinstance(law, kind))


def plain(fit: Fit, held: Points, left_out: Mapping[str, int], profiles: Profiles | None) -> dict[str, Any]:
    """Everything that is printed, and the bootstraps, too, from which later intervals come."""
    named = dict(zip(fit.law.labels, fit.constants.tolist(), strict=True))
    known = {
        'law': name_of(fit.law),
        'constants': named,
        'standard_errors': _by(fit, fit.standard_errors),
        'intervals': _by(fit, quantiles(fit.draws).T if len(fit.draws) else fit.draws),
        'runs': fit.runs,
        'left_out': dict(left_out),
        'objective': fit.objective,
        'spread': fit.spread,
        'warnings': list(fit.warnings),
        'held_out': _held(fit, held),
        'draws': [[float(f'{value:.9g}') for value in draw] for draw in fit.draws if np.isfinite(draw).all()],
    }
    if isinstance(fit.law, Repeats):
        known['base'] = list(fit.law.base)
    else:
        known['exponents'] = dict(zip(('N', 'D'), map(_estimate, exponents(fit)), strict=True))
    if profiles is not None:
        known['valleys'] = _valleys(profiles)
    return known


def _by(fit: Fit, values: np.ndarray) -> dict[str, Any]:
    """By label; what is not finite is null, which JSON has."""
    return {
        label: np.where(
            np.isfinite(value), value, np.asarray(None)
        ).tolist()  # of a number, or of both ends of an interval
        for label, value in zip(fit.law.labels, values, strict=False)
    }


def _estimate(each: Any) -> dict[str, float | None]:
    found = {'value': each.value, 'low': each.low, 'high': each.high}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _held(fit: Fit, held: Points) -> list[dict[str, Any]]:
    if not len(held):
        return []
    predicted = fit.predict(held)
    low, high = fit.interval(held) if len(fit.draws) else (predicted, predicted)
    return [
        {
            'name': held.names[i],
            'parameters': float(held.parameters[i]),
            'tokens': float(held.tokens[i]),
            'flops': float(held.flops[i]),
            'loss': float(held.loss[i]),
            'predicted': float(predicted[i]),
            'low': float(low[i]),
            'high': float(high[i]),
            'error': float(predicted[i] / held.loss[i] - 1),
        }
        for i in range(len(held))
    ]


def _valleys(profiles: Profiles) -> dict[str, Any]:
    def law(power: PowerLaw | None) -> dict[str, Any] | None:
        return power and {'scale': _estimate(power.scale), 'power': _estimate(power.power)}

    return {
        'minima': [
            {
                'flops': valley.flops,
                'runs': len(valley.runs),
                'near': len(valley.near),
                'parameters': _estimate(valley.parameters),
                'tokens': _estimate(valley.tokens),
                'loss': _estimate(valley.loss),
                'problem': valley.problem,
            }
            for valley in profiles.valleys
        ],
        'parameters': law(profiles.parameters),
        'tokens': law(profiles.tokens),
        'warnings': list(profiles.warnings),
    }


def load(path: str | Path) -> Fit:
    """The fit of a file that `python -m tpu_llm.scaling fit … --json` printed. Raises ConfigError where it is none."""
    if not Path(path).exists():
        raise ConfigError(f'there is no file {path}')
    try:
        found = json.loads(Path(path).read_text())
        kind = found['law']
        if kind not in LAWS:
            raise ConfigError(f'{path}: law {kind!r} is unknown{nearest(kind, LAWS)}; there are {", ".join(LAWS)}')
        law = Repeats(base=tuple(found['base'])) if kind == 'repeats' else LAWS[kind]()
        return Fit(
            law=law,
            constants=np.array([found['constants'][label] for label in law.labels], float),
            draws=np.array(found['draws'], float).reshape(-1, len(law.labels)),
            runs=found['runs'],
            objective=found['objective'],
            spread=found['spread'],
            warnings=tuple(found['warnings']),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        mend = 'write one with python -m tpu_llm.scaling fit CSV --json > FIT.json'
        raise ConfigError(f'{path} is no fit ({type(error).__name__}: {error}); {mend}') from None

"""Optimizer configs. Each makes one optax chain over a flat `{path: array}` of parameters:

clip the gradients' global norm → the parameter's own gain → the method's direction → weight decay → its own scale,

and then takes a step of the learning rate in that direction. A parameter with a `nudge` (a router's bias) is left out
of all that: each step moves it by so much against the sign of its gradient.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError
from tpu_llm.optim.factored import scale_by_factored_moments
from tpu_llm.optim.params import Axes, ParamInfo, matrix
from tpu_llm.optim.schedule import Schedule

Arrays = dict[str, Any]  # by path


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """An optimizer at work: pure functions over parameters and gradients by path, and optax's state.

    The rate is that of the run's step. optax's own count is of updates, and a skipped step is none: by it, every one
    would shift the schedule.
    """

    direction: optax.GradientTransformation
    schedule: optax.Schedule  # step → its rate as a share of the peak
    nudges: Mapping[str, float]  # parameters that are not optimised, and how far a step moves them

    def init(self, params: Arrays) -> optax.OptState:
        return self.direction.init(self._optimised(params))

    @jax.named_scope('optimizer')
    def __call__(
        self,
        gradients: Arrays,
        state: optax.OptState,
        params: Arrays,
        step: Int[Array, ''],
        peak: Float[Array, ''] | float,
    ) -> tuple[Arrays, optax.OptState, Float[Array, '']]:
        """Parameters and state after an update at `step` (which counts from 0), and the learning rate it took, of a
        schedule with that peak.
        """
        directions, state = self.direction.update(self._optimised(gradients), state, self._optimised(params))
        rate = peak * jnp.asarray(self.schedule(step), jnp.float32)
        nudged = {path: by * _sign(gradients[path]) for path, by in self.nudges.items()}
        moved = jax.tree.map(lambda direction: rate * direction, directions) | nudged
        return {path: value - moved[path] for path, value in params.items()}, state, rate

    @jax.named_scope('optimizer')
    def norm(self, gradients: Arrays) -> Float[Array, '']:
        """The global norm of the gradients that are optimised; NaN where one that only nudges is not finite."""
        sound = jnp.array([jnp.isfinite(gradients[path]).all() for path in self.nudges], bool).all()
        return jnp.where(sound, optax.tree.norm(self._optimised(gradients)), jnp.nan)

    def _optimised(self, arrays: Arrays) -> Arrays:
        return {path: x for path, x in arrays.items() if path not in self.nudges}


@dataclasses.dataclass(kw_only=True, slots=True)
class Group:
    """Settings for the parameters whose path `match`es (a regular expression, anywhere in the path)."""

    match: str
    learning_rate: float = 1.0  # times the schedule's
    weight_decay: float = 1.0  # times the optimizer's

    def validate(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ConfigError(f'match = {self.match!r} is not a regular expression: {error}') from None


@dataclasses.dataclass(kw_only=True, slots=True)
class Optimizer:
    """What all optimizers share. Weight decay is decoupled and falls on matrices only, not on norms and biases."""

    schedule: Schedule
    clip: float = 1.0  # of the gradients' global norm; 0: none
    weight_decay: float = 0.0
    groups: tuple[Group, ...] = ()

    def validate(self) -> None:
        if self.clip < 0 or self.weight_decay < 0:
            raise ConfigError(f'clip = {self.clip} and weight_decay = {self.weight_decay} must not be negative')
        for name in ('b1', 'b2', 'momentum'):
            if not 0.0 <= getattr(self, name, 0.0) < 1.0:
                raise ConfigError(f'{name} is {getattr(self, name)}; write a share to keep, from 0 to below 1')
        for name in ('eps', 'decay_rate', 'min_factored'):
            if getattr(self, name, 1) <= 0:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be above 0')

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        """The method itself: gradients to an unscaled step."""
        raise AssertionError('Optimizer is the base; choose AdamW, Lion, …')

    def make(self, infos: Mapping[str, ParamInfo], steps: int) -> Update:
        """The whole chain, for a run of so many steps. Raises ConfigError for a group that matches no parameter."""
        nudges = {path: info.nudge for path, info in infos.items() if info.nudge}
        infos = {path: info for path, info in infos.items() if path not in nudges}
        for group in self.groups:
            if not any(re.search(group.match, path) for path in infos):
                raise ConfigError(f'optimizer group {group.match!r} matches none of the {len(infos)} parameters')
        rates = {path: info.rate * self._factor(path, 'learning_rate') for path, info in infos.items()}
        decays = {
            path: self.weight_decay * self._factor(path, 'weight_decay') * (matrix(path, info) is not None) / info.rate
            for path, info in infos.items()
        }
        gains = {path: info.gain for path, info in infos.items()}
        chain = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        if any(gain != 1.0 for gain in gains.values()):
            chain.append(_scale_each(gains))
        chain.append(self.direction(infos))
        if any(decays.values()):
            chain.append(_add_decay(decays))
        if any(rate != 1.0 for rate in rates.values()):
            chain.append(_scale_each(rates))
        return Update(optax.chain(*chain), self.schedule.make(steps), nudges)

    def _factor(self, path: str, field: str) -> float:
        """The product of that field over the groups that match."""
        factor = 1.0
        for group in self.groups:
            if re.search(group.match, path):
                factor *= getattr(group, field)
        return factor


@dataclasses.dataclass(kw_only=True, slots=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017, arXiv 1711.05101); weight_decay 0 is Adam."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(kw_only=True, slots=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: float = 0.9
    nesterov: bool = False

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(kw_only=True, slots=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al., 2023, arXiv 2302.06675)."""

    b1: float = 0.9
    b2: float = 0.99

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(kw_only=True, slots=True)
class Adafactor(Optimizer):
    """Second moments kept as rows and columns (Shazeer and Stern, 2018, arXiv 1804.04235); RMS at most 1."""

    decay_rate: float = 0.8
    min_factored: int = 128  # matrices with fewer rows or columns keep their full second moment

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        return scale_by_factored_moments(infos, decay_rate=self.decay_rate, min_factored=self.min_factored)


@dataclasses.dataclass(kw_only=True, slots=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the layers' matrices, Adam for all else (Jordan et al., 2024).

    Steps are scaled to Adam's usual RMS of 0.2 a weight, so both share one learning rate (Liu et al., 2025,
    arXiv 2502.16982).
    """

    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        maps = {path: info.linear_map for path, info in infos.items() if info.linear_map}
        if any(info.rate != 1.0 for info in infos.values()):
            raise ConfigError(
                'the model takes its learning rate from a smaller one (models/mup.py), by rules for steps of single '
                'entries, and those of Muon are orthogonal matrices; use AdamW, Lion, Adafactor or SGD'
            )
        dims = {path: contrib.MuonDimensionNumbers(*axes) for path, axes in maps.items()}

        # optax hides the other group's entries behind MaskedNode, and wants it back in their places.
        def dims_of(updates: Any) -> Any:
            return {path: dims.get(path, update) for path, update in updates.items()}

        def to_adams_size(updates: Any, params: Any) -> Any:
            return {path: _to_rms(u, infos[path], maps[path]) if path in maps else u for path, u in updates.items()}

        muon = optax.chain(
            contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=dims_of),
            optax.stateless(to_adams_size),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        labels = {path: 'muon' if path in dims else 'adam' for path in infos}
        return optax.partition({'adam': adam, 'muon': muon}, labels)


def _to_rms(update: Array, info: ParamInfo, axes: Axes) -> Array:
    """An orthogonal step, scaled to a root mean square of 0.2 an entry."""
    return 0.2 * max(info.count(update.shape, each) for each in axes) ** 0.5 * update


def _add_decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        assert params is not None
        return {path: u + decays[path] * params[path] if decays[path] else u for path, u in updates.items()}

    return optax.stateless(update)


def _scale_each(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return {path: factors[path] * u for path, u in updates.items()}

    return optax.stateless(update)


def _sign(gradient: Array) -> Array:
    """Its sign, 0 within a millionth of 0: an even load must not be pushed about by rounding."""
    return jnp.where(jnp.abs(gradient) > 1e-6, jnp.sign(gradient), 0.0)

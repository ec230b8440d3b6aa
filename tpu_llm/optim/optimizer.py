"""Optimizer configs. Each makes one optax chain over a flat `{path: array}` of parameters:

clip the gradients' global norm → the method's direction → weight decay → per-group scale → learning rate.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError
from tpu_llm.optim.schedule import Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class ParamInfo:
    """What an optimizer may know of a parameter besides its value."""

    dims: str
    summed: str  # the dims a linear map sums over; empty for what is no linear map


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

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        """The method itself: gradients to an unscaled step."""
        raise AssertionError('Optimizer is the base; choose AdamW, Lion, …')

    def make(self, infos: Mapping[str, ParamInfo], steps: int) -> optax.GradientTransformation:
        """The whole chain. Raises ConfigError for a group that matches no parameter."""
        for group in self.groups:
            if not any(re.search(group.match, path) for path in infos):
                raise ConfigError(f'optimizer group {group.match!r} matches none of the {len(infos)} parameters')
        rates = {path: self._factor(path, 'learning_rate') for path in infos}
        decays = {
            path: self.weight_decay * self._factor(path, 'weight_decay') * _is_matrix(path, info)
            for path, info in infos.items()
        }
        chain = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        chain.append(self.direction(infos))
        if any(decays.values()):
            chain.append(_add_decay(decays))
        if any(rate != 1.0 for rate in rates.values()):
            chain.append(_scale_each(rates))
        return optax.chain(*chain, optax.scale_by_learning_rate(self.schedule.make(steps)))

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
    min_factored: int = 128  # dims shorter than this keep their full second moment

    def direction(self, infos: Mapping[str, ParamInfo]) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_factored),
            optax.clip_by_block_rms(1.0),
        )


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
        shapes = {path: _matrix_dims(info) for path, info in infos.items()}

        # optax hides the other group's entries behind MaskedNode, and wants it back in their places.
        def dims_of(updates: Any) -> Any:
            return {p: u if isinstance(u, optax.MaskedNode) else shapes[p] for p, u in updates.items()}

        def to_adams_size(updates: Any, params: Any) -> Any:
            return jax.tree.map(_scale_to_rms, updates, dims_of(updates))

        muon = optax.chain(
            contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=dims_of),
            optax.stateless(to_adams_size),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        labels = {path: 'muon' if shapes[path] else 'adam' for path in infos}
        return optax.partition({'adam': adam, 'muon': muon}, labels)


def _is_matrix(path: str, info: ParamInfo) -> bool:
    # A bias may have two dims as well: one number for each head and place ('NH').
    return len(info.dims.removeprefix('L')) > 1 and not path.endswith('.bias')


def _matrix_dims(info: ParamInfo) -> contrib.MuonDimensionNumbers | None:
    """Which dims are the rows and columns of a layer's linear map; None for everything else."""
    if not info.summed:
        return None
    rows = tuple(i for i, letter in enumerate(info.dims) if letter in info.summed)
    columns = tuple(i for i, letter in enumerate(info.dims) if letter not in info.summed + 'L')
    return contrib.MuonDimensionNumbers(rows, columns) if columns else None


def _scale_to_rms(update: Array, dims: contrib.MuonDimensionNumbers) -> Array:
    """An orthogonal step, scaled to a root mean square of 0.2 an entry."""
    rows, columns = (int(np.prod(np.take(update.shape, axes))) for axes in dims)
    return 0.2 * max(rows, columns) ** 0.5 * update


def _add_decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        assert params is not None
        return {path: u + decays[path] * params[path] if decays[path] else u for path, u in updates.items()}

    return optax.stateless(update)


def _scale_each(rates: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return {path: rates[path] * u for path, u in updates.items()}

    return optax.stateless(update)

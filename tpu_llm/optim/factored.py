"""Adafactor's direction: the second moment of a matrix kept as the means of its rows and of its columns.

Shazeer and Stern, 2018, arXiv 1804.04235. optax factors an array over its two longest dims, whatever they mean; here a
matrix is that of a linear map, and layers stacked in one array are stepped each by itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.optim.params import Axes, ParamInfo, matrix

_EPSILON = 1e-30  # added to squares: the paper's first epsilon


class Moments(NamedTuple):
    """Second moments by path. `rows` and `columns` keep the parameter's rank: what was averaged over is of size 1."""

    count: Int[Array, '']
    rows: dict[str, Array]
    columns: dict[str, Array]
    full: dict[str, Array]  # of parameters that are not factored


def scale_by_factored_moments(
    infos: Mapping[str, ParamInfo], *, decay_rate: float, min_factored: int
) -> optax.GradientTransformation:
    """Gradients over the roots of their second moments, the result then scaled down to an RMS of 1 at most.

    The t-th moment forgets by 1 − t^−decay_rate, so the first is the first gradient's square.
    """

    def axes_of(params: Mapping[str, Array]) -> dict[str, Axes]:
        found = {path: matrix(path, infos[path]) for path in params}
        return {
            path: axes
            for path, axes in found.items()
            if axes and min(infos[path].count(params[path].shape, each) for each in axes) >= min_factored
        }

    def init(params: Any) -> Moments:
        axes = axes_of(params)
        zeros = {path: jnp.zeros_like(value) for path, value in params.items()}
        return Moments(
            jnp.zeros((), jnp.int32),
            rows={path: _mean(zeros[path], each.columns) for path, each in axes.items()},
            columns={path: _mean(zeros[path], each.rows) for path, each in axes.items()},
            full={path: zero for path, zero in zeros.items() if path not in axes},
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        del params
        count = state.count + 1
        keep = 1.0 - count.astype(jnp.float32) ** -decay_rate

        def moved(moment: Array, squares: Array) -> Array:
            return keep * moment + (1.0 - keep) * squares

        axes, steps = axes_of(updates), {}
        new = Moments(count, {}, {}, {})
        for path, gradient in updates.items():
            squares = jnp.square(gradient) + _EPSILON
            if path in axes:
                rows = new.rows[path] = moved(state.rows[path], _mean(squares, axes[path].columns))
                columns = new.columns[path] = moved(state.columns[path], _mean(squares, axes[path].rows))
                # Root by root: the product of two small moments would be rounded to zero.
                mean = jnp.sqrt(_mean(rows, axes[path].rows))
                steps[path] = gradient * jax.lax.rsqrt(rows) * jax.lax.rsqrt(columns) * mean
            else:
                full = new.full[path] = moved(state.full[path], squares)
                steps[path] = gradient * jax.lax.rsqrt(full)
        return {path: _clip(step, infos[path]) for path, step in steps.items()}, new

    return optax.GradientTransformation(init, update)


def _mean(x: Float[Array, '...'], axes: tuple[int, ...]) -> Float[Array, '...']:
    return x.mean(axis=axes, keepdims=True)


def _clip(step: Float[Array, '...'], info: ParamInfo) -> Float[Array, '...']:
    """Each stacked parameter by itself. What only pads the vocabulary is zero and not counted."""
    own = tuple(range(info.stack, step.ndim))
    mean = jnp.square(step).sum(axis=own, keepdims=True) / info.count(step.shape, own)
    return step / jnp.maximum(1.0, jnp.sqrt(mean))

"""What the state space layers share: a short convolution, and a scan over chunks of a row.

Such a layer remembers a row as a state of one size, however long the row is. A state and the convolution begin anew
with each document of a packed row; padding, which stands at the ends of a row, leaves both as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array, Bool, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.nn.cache import StateCache
from tpu_llm.nn.param import Constant, Normal, param


def check_sizes(config: object, names: Sequence[str]) -> None:
    """Raises ConfigError for a size below 1, and for a convolution that sees a token alone."""
    for name in names:
        least = 2 if name == 'conv' else 1
        if getattr(config, name) < least:
            raise ConfigError(f'ssm.{name} is {getattr(config, name)}; it must be at least {least}')


# ------------------------------------------------------------------------------------------- what came before


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """For each token of T, where the W tokens of its document are that end with it."""

    segments: Int[Array, 'B T']
    same: Sequence[Bool[Array, 'B T']]  # by distance: whether there is such a token
    slots: Int[Array, 'B T W'] | None = None  # with a cache: where, in what it holds and then the T
    kept: Int[Array, 'B _'] | None = None  # and the last W - 1, that the next token will see

    @property
    def real(self) -> Bool[Array, 'B T']:
        return self.segments != 0

    @property
    def carries(self) -> Bool[Array, 'B T']:
        """Whether a token finds the state that the one before has left."""
        return self.same[1] | ~self.real

    def taps(self, x: Float[Array, 'B T *P'], seen: Float[Array, 'B _ *P'] | None) -> list[Float[Array, 'B T *P']]:
        """What stands 0, 1, … W - 1 tokens before each; 0 where that is another document."""
        if self.slots is None:
            found = [_shifted(x, distance) for distance in range(len(self.same))]
        else:
            whole = _joined(seen, x)
            found = [_taken(whole, self.slots[..., distance]) for distance in range(len(self.same))]
        return [jnp.where(_spread(same, each), each, 0) for same, each in zip(self.same, found, strict=True)]

    def keep(self, x: Array, seen: Array) -> Array:
        """What a cache holds after these tokens."""
        assert self.kept is not None
        return _taken(_joined(seen, x), self.kept).astype(seen.dtype)


def look_back(segments: Int[Array, 'B T'], width: int, cache: StateCache | None) -> Past:
    """Where the tokens are that a convolution over `width` sees. With a cache they are found through any padding."""
    if cache is None:
        same = [(_shifted(segments, distance) == segments) & (segments != 0) for distance in range(width)]
        return Past(segments=segments, same=same)
    whole = jnp.concatenate([cache.segments, segments], axis=1)
    counted = whole.at[:, : width - 1].set(1) != 0
    order = jnp.argsort(~counted, axis=1, stable=True)  # the slot of the first that is no padding, of the second, …
    rank = jnp.cumsum(counted, axis=1) - 1
    slots = jnp.stack([_taken(order, jnp.maximum(rank[:, width - 1 :] - back, 0)) for back in range(width)], axis=-1)
    same = [(_taken(whole, slots[..., back]) == segments) & (segments != 0) for back in range(width)]
    kept = _taken(order, rank[:, -1:] + jnp.arange(2 - width, 1)[None])
    return Past(segments=segments, same=same, slots=slots, kept=kept)


def _shifted(x: Array, distance: int) -> Array:
    """x[:, t - distance], 0 before the first."""
    lead = [(0, 0), (distance, 0)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, lead)[:, : x.shape[1]]


def _joined(seen: Array | None, x: Array) -> Array:
    assert seen is not None
    return jnp.concatenate([seen.astype(x.dtype), x], axis=1)


def _taken(x: Array, slots: Int[Array, 'B _']) -> Array:
    return jnp.take_along_axis(x, _spread(slots, x), axis=1)


def _spread(x: Array, over: Array) -> Array:
    """With dims of size one, for those that `over` has more."""
    return x.reshape(*x.shape, *(1,) * (over.ndim - x.ndim))


class Conv(nnx.Module):
    """silu(bias + Σ kernel[w] · the token W - 1 - w before), each number of a token by itself."""

    def __init__(self, dims: str, shape: tuple[int, ...], width: int):
        self.kernel = param(f'W{dims}', (width, *shape), Normal(width**-0.5))
        self.bias = param(dims, shape, Constant(0.0))

    def __call__(self, taps: Sequence[Float[Array, 'B T *P']]) -> Float[Array, 'B T *P']:
        dtype = taps[0].dtype
        kernel = self.kernel[...].astype(dtype)
        terms = [tap * kernel[-1 - back][None, None] for back, tap in enumerate(taps)]
        return jax.nn.silu(sum(terms[1:], terms[0]) + self.bias[...].astype(dtype)[None, None])


# ------------------------------------------------------------------------------------------- a scan over chunks


def chunked(
    body: Callable[[Array, tuple[Array, ...]], tuple[Array, Array]],
    state: Float[Array, 'B ...'],
    rows: tuple[Float[Array, 'B T ...'], ...],
    carries: Bool[Array, 'B T'],
    chunk: int,
) -> tuple[Array, Array]:
    """`body(state, (*rows, carries))` for `chunk` tokens after another: the last state, and what it gave for T.

    The backward pass finds the states between chunks saved and computes the rest again: T / chunk states of memory
    and one chunk's work, not T states.
    """
    length = rows[0].shape[1]
    if length <= chunk:
        return body(state, (*rows, carries))
    count = -(-length // chunk)

    def split(x: Array, fill: float) -> Array:
        tail = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, tail, constant_values=fill)
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Rows of zeros behind the last token have steps of 0, which change no state.
    parts = (*(split(x, 0) for x in rows), split(carries, True))
    state, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, parts)
    out = out.swapaxes(0, 1)
    return state, out.reshape(out.shape[0], count * chunk, *out.shape[3:])[:, :length]


# ------------------------------------------------------------------------------------------- how they begin


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """Biases b of which softplus(b) lies between 0.001 and 0.1, evenly in its logarithm (Gu and Dao, 2023, §3.6)."""

    def __call__(self, key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
        return jnp.asarray(_steps())[jax.random.bits(key, shape, 'uint16')]


@functools.cache
def _steps() -> np.ndarray:
    """float32[65536], as even as 16 random bits choose."""
    even = (np.arange(2**16) + 0.5) / 2**16
    steps = np.exp(np.log(0.001) + even * (np.log(0.1) - np.log(0.001)))
    return (steps + np.log(-np.expm1(-steps))).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class LogCount:
    """log 1, log 2, … along the last dim: each place of a state forgets at its own pace (Gu and Dao, 2023, §3.6)."""

    def __call__(self, key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
        del key
        return jnp.broadcast_to(jnp.asarray(np.log(np.arange(1, shape[-1] + 1)), jnp.float32), shape)


@dataclasses.dataclass(frozen=True, slots=True)
class LogEven:
    """Logarithms of numbers evenly between 1 and 16: what a head of Mamba-2 forgets by (state-spaces/mamba)."""

    def __call__(self, key: Key[Array, ''], shape: tuple[int, ...]) -> Float[Array, '...']:
        table = np.log(1 + 15 * (np.arange(2**16) + 0.5) / 2**16)
        return jnp.asarray(table, jnp.float32)[jax.random.bits(key, shape, 'uint16')]

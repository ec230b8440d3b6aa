"""Rotary frequencies for rows longer than those a model was trained on.

Each scheme gives, for `dim` numbers of a head that turn and the base `theta`, the frequencies of their pairs and what
sin and cos are multiplied by. Most are the same whatever the row; some ask for its length so far.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError

# [dim / 2], or a row's own [B, dim / 2]; and the factor.
Frequencies = tuple[Float[Array, '... _'], float]


def plain(dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / dim), float64[dim / 2]."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def _check(scheme: object, *names: str) -> None:
    kind = type(scheme).__name__
    for name in names:
        if getattr(scheme, name) <= 0:
            raise ConfigError(f'{kind}.{name} is {getattr(scheme, name)}; it must be above 0')


def _check_factor(scheme: 'Linear | NTK | DynamicNTK | YaRN | Llama3') -> None:
    if scheme.factor < 1:
        kind = type(scheme).__name__
        raise ConfigError(f'{kind}.factor is {scheme.factor}; it is how many times longer rows become, 1 or more')


# Hashed by value, since a module keeps a copy of its own: a config may change, that copy does not.
@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Linear:
    """Position interpolation: positions are divided by `factor` (Chen et al., 2023, arXiv 2306.15595)."""

    factor: float

    def validate(self) -> None:
        _check_factor(self)

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        return jnp.asarray(plain(dim, theta) / self.factor, jnp.float32), 1.0


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class NTK:
    """The base grows so that the slowest pair turns `factor` times slower, the fastest as ever (Peng et al., 2023,
    arXiv 2309.00071, section 3.1).
    """

    factor: float

    def validate(self) -> None:
        _check_factor(self)

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        return jnp.asarray(plain(dim, theta * self.factor ** (dim / (dim - 2))), jnp.float32), 1.0


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class DynamicNTK:
    """NTK by as much as the row so far is longer than `original_length` (arXiv 2309.00071, section 3.3).

    At l times the original length the base grows as for the factor `factor` · l - (`factor` - 1). Keys that wait in a
    cache stay turned as they were when they came.
    """

    factor: float
    original_length: int

    def validate(self) -> None:
        _check_factor(self)
        _check(self, 'original_length')

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        times = jnp.maximum(length.astype(jnp.float32) / self.original_length, 1.0)
        grown = self.factor * times - (self.factor - 1.0)
        # (theta · grown^(d / (d - 2)))^(-2i / d), the part without `grown` in float64.
        powers = -np.arange(0, dim, 2) / (dim - 2)
        own = jnp.asarray(plain(dim, theta), jnp.float32)
        return own[None] * grown[:, None] ** jnp.asarray(powers, jnp.float32)[None], 1.0


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class YaRN:
    """Pairs that turn often within `original_length` stay, those that turn less than once are interpolated, and
    between them a ramp (Peng et al., 2023, arXiv 2309.00071, sections 3.2 and 3.4).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0  # turns within the original length from which on a pair stays as it is
    beta_slow: float = 1.0  # turns below which it is interpolated
    attention_factor: float = 0.0  # of sin and cos; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # the ramp's ends are whole pairs

    def validate(self) -> None:
        _check_factor(self)
        _check(self, 'original_length', 'beta_slow')
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(f'YaRN.beta_fast = {self.beta_fast} must be above beta_slow = {self.beta_slow}')
        if self.attention_factor < 0:
            raise ConfigError(
                f'YaRN.attention_factor is {self.attention_factor}; it must be above 0, or 0 for 0.1 ln(factor) + 1'
            )

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        own = plain(dim, theta)

        def pair(turns: float) -> float:
            """The (fractional) pair that makes so many turns within the original length."""
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        factor = self.attention_factor or 0.1 * math.log(self.factor) + 1.0
        return jnp.asarray(own * (1 - ramp) + own / self.factor * ramp, jnp.float32), factor


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Llama3:
    """Like YaRN, by wavelength: those shorter than `original_length` / `high_freq_factor` stay, those longer than
    `original_length` / `low_freq_factor` are interpolated (Llama 3.1: Grattafiori et al., 2024, arXiv 2407.21783, and
    the code published with it).
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def validate(self) -> None:
        _check_factor(self)
        _check(self, 'original_length', 'low_freq_factor')
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f'Llama3.high_freq_factor = {self.high_freq_factor} must be above low_freq_factor = '
                f'{self.low_freq_factor}'
            )

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        own = plain(dim, theta)
        turns = self.original_length * own / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return jnp.asarray(own * kept + own / self.factor * (1 - kept), jnp.float32), 1.0


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class LongRope:
    """A divisor for each pair's frequency, found by search; other ones once the row so far is longer than
    `original_length` (Ding et al., 2024, arXiv 2402.13753). Keys that wait in a cache stay turned as they were.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float  # of sin and cos; Phi-3: sqrt(1 + ln(times longer) / ln(original_length))

    def validate(self) -> None:
        _check(self, 'original_length', 'attention_factor')
        if len(self.short) != len(self.long) or min((*self.short, *self.long), default=0) <= 0:
            raise ConfigError(
                f'LongRope.short has {len(self.short)} factors and long {len(self.long)}; write one above 0 for each '
                'pair in both'
            )

    def frequencies(self, dim: int, theta: float, length: Int[Array, ' B']) -> Frequencies:
        short, long = (jnp.asarray(plain(dim, theta) / np.array(by), jnp.float32) for by in (self.short, self.long))
        return jnp.where((length > self.original_length)[:, None], long[None], short[None]), self.attention_factor


RopeScaling = Linear | NTK | DynamicNTK | YaRN | Llama3 | LongRope

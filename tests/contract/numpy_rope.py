"""Rotary frequencies for longer rows again, pair by pair."""

import math
from typing import Any

from tpu_llm.nn.rope_scaling import NTK, DynamicNTK, Linear, Llama3, LongRope, YaRN


def frequencies(scaling: Any, dim: int, theta: float, length: int) -> tuple[list[float], float]:
    """Of each pair, in a row of `length` tokens, and what sin and cos are multiplied by."""
    factor = 1.0
    if isinstance(scaling, YaRN):
        factor = scaling.attention_factor or 1 + math.log(scaling.factor) / 10
    if isinstance(scaling, LongRope):
        factor = scaling.attention_factor
    return [_frequency(scaling, i, dim, theta, length) for i in range(dim // 2)], factor


def _frequency(scaling: Any, i: int, dim: int, theta: float, length: int) -> float:
    own = 1 / theta ** (2 * i / dim)
    match scaling:
        case None:
            return own
        case Linear():
            return own / scaling.factor
        case NTK():
            return _grown(theta, scaling.factor, i, dim)
        case DynamicNTK():
            times = max(length, scaling.original_length) / scaling.original_length
            return _grown(theta, scaling.factor * times - scaling.factor + 1, i, dim)
        case LongRope():
            return own / (scaling.long if length > scaling.original_length else scaling.short)[i]
        case Llama3():
            wave = 2 * math.pi / own
            if wave < scaling.original_length / scaling.high_freq_factor:
                return own
            if wave > scaling.original_length / scaling.low_freq_factor:
                return own / scaling.factor
            span = scaling.high_freq_factor - scaling.low_freq_factor
            share = (scaling.original_length / wave - scaling.low_freq_factor) / span
            return share * own + (1 - share) * own / scaling.factor
        case YaRN():
            # The pair whose wavelength fits so many times into the original length, as a real number.
            first, last = (
                math.log(scaling.original_length / (2 * math.pi * turns), theta) * dim / 2
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(0, first), min(dim - 1, last)
            share = min(1.0, max(0.0, (i - first) / (last - first or 0.001)))
            return own * (1 - share) + own / scaling.factor * share
    raise AssertionError(scaling)


def _grown(theta: float, by: float, i: int, dim: int) -> float:
    return (theta * by ** (dim / (dim - 2))) ** (-2 * i / dim)

"""Positions in a GGUF file's metadata: rope and its scaling, and which layers have a window.

Of some scalings a file keeps tables beside the weights; they go by keys in parentheses, `(rope_freqs.weight)`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpu_llm.checkpoint.family import period
from tpu_llm.checkpoint.fields import Item, Rule, Theirs
from tpu_llm.config import ConfigError
from tpu_llm.nn.rope_scaling import Linear, Llama3, LongRope, RopeScaling, YaRN

TABLES = ('(rope_freqs.weight)', '(rope_factors_short.weight)', '(rope_factors_long.weight)')
FREQS, SHORT, LONG = TABLES

# Llama 3.1 and 3.2's, of which files keep only the factors that follow.
_LLAMA3 = [
    Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192) for factor in (8.0, 32.0)
]


def _rope(theirs: Theirs) -> Mapping[str, Any]:
    head_dim = theirs.take('attention.key_length', theirs['embedding_length'] // theirs['attention.head_count'])
    turned, theta = theirs.take('rope.dimension_count', head_dim), theirs.take('rope.freq_base', 10_000.0)
    return {
        'rope_theta': theta,
        'rope_dim': 0 if turned == head_dim else turned,
        'rope_scaling': _scaling(theirs, turned, theta),
        'head_dim': head_dim,
    }


def _scaling(theirs: Theirs, turned: int, theta: float) -> RopeScaling | None:
    kind, original = theirs.take('rope.scaling.type', 'none'), theirs.take('rope.scaling.original_context_length', 0)
    factors, short, long = (theirs.take(key, None) for key in TABLES)
    attention_factor = theirs.take('rope.scaling.attn_factor', 1.0)
    if short is not None and long is not None:
        return LongRope(
            short=tuple(map(plain, short)),
            long=tuple(map(plain, long)),
            original_length=original,
            attention_factor=attention_factor,
        )
    if attention_factor != 1.0:
        raise ConfigError(f'rope.scaling.attn_factor = {attention_factor} is not implemented without factors')
    if factors is not None:
        for each in _LLAMA3:
            if np.allclose(_factors(each, turned, theta), factors, rtol=1e-4):
                return each
        raise ConfigError('rope_freqs.weight are factors of no scaling that we know')
    match kind:
        case 'none':
            return None
        case 'linear':
            return Linear(factor=theirs.take('rope.scaling.factor'))
        case 'yarn':
            return YaRN(factor=theirs.take('rope.scaling.factor'), original_length=original)
    raise ConfigError(f'rope.scaling.type = {kind!r} is not implemented; known are none, linear, yarn')


def plain(value: Any) -> Any:
    """A float32 as the number that was written down: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, (float, np.floating)) else value


def _factors(scaling: Llama3, turned: int, theta: float) -> np.ndarray:
    """How many times slower each pair turns, float32[turned / 2]: what files keep of such a scaling."""
    own = theta ** (-np.arange(0, turned, 2) / turned)
    scaled, _ = scaling.frequencies(turned, theta, jnp.ones(1, jnp.int32))
    return (own / np.asarray(scaled)).astype(np.float32)


def _rope_back(ours: Any) -> Mapping[str, Any]:
    theirs = {
        'attention.key_length': ours.head_dim,
        'attention.value_length': ours.head_dim,
        'rope.dimension_count': ours.turned,
        'rope.freq_base': ours.rope_theta,
    }
    match ours.rope_scaling:
        case Linear(factor=factor):
            theirs |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': factor}
        case YaRN(factor=factor, original_length=original):
            theirs |= {'rope.scaling.type': 'yarn', 'rope.scaling.factor': factor}
            theirs |= {'rope.scaling.original_context_length': original}
        case Llama3() if ours.rope_scaling in _LLAMA3:
            theirs |= {FREQS: _factors(ours.rope_scaling, ours.turned, ours.rope_theta)}
        case LongRope(short=short, long=long, original_length=original, attention_factor=factor):
            theirs |= {'rope.scaling.original_context_length': original, 'rope.scaling.attn_factor': factor}
            theirs |= {SHORT: np.array(short, np.float32), LONG: np.array(long, np.float32)}
        case None:
            pass
        case other:
            raise ConfigError(f'GGUF has no {type(other).__name__} with these numbers')
    return theirs


def rope(*tables: str) -> Item:
    """Of an architecture for which llama.cpp reads these tables."""

    def write(ours: Any) -> Mapping[str, Any]:
        theirs = _rope_back(ours)
        if set(TABLES) & set(theirs) - set(tables):
            raise ConfigError(f'llama.cpp reads no {type(ours.rope_scaling).__name__} of this architecture')
        return theirs

    return Rule(_rope, write)


ROPE = rope()


def windows(default: int, cycle: int) -> Item:
    """Where the config does not list them, all layers slide but the last of each `cycle`."""

    def slides(theirs: Mapping[str, Any]) -> list[bool]:
        said = theirs.get('attention.sliding_window_pattern', cycle)
        if isinstance(said, int):
            return [not said or (i + 1) % said != 0 for i in range(theirs['block_count'])]
        return [bool(each) for each in said]

    def read(theirs: Theirs) -> Mapping[str, Any]:
        theirs.seen.add('attention.sliding_window_pattern')
        window = theirs.take('attention.sliding_window', default)
        return {'windows': tuple(window if each else 0 for each in period(slides(theirs))) if window else (0,)}

    def write(ours: Any) -> Mapping[str, Any]:
        sizes = {size for size in ours.windows if size} or {0}
        if len(sizes) > 1:
            raise ConfigError(f'windows = {ours.windows} have more than one size')
        theirs = {'attention.sliding_window': sizes.pop()}
        own = [bool(ours.windows[i % len(ours.windows)]) for i in range(ours.layers)]
        if any(own) and own != slides({'block_count': ours.layers}):
            theirs['attention.sliding_window_pattern'] = own
        return theirs

    return Rule(read, write)

"""Rotary positions in a Hugging Face config: base, turned part of a head, and how they were stretched to longer texts.

Written as `rope_theta`, `partial_rotary_factor` and `rope_scaling`, which every version of transformers reads; read
also as `rope_parameters`, which its versions from 5 on write.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tpu_llm.checkpoint.fields import Theirs
from tpu_llm.config import ConfigError
from tpu_llm.nn.rope_scaling import DynamicNTK, Linear, Llama3, LongRope, RopeScaling, YaRN


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """`partial` is the family's default share of a head that turns; `keys` its own names of theta and of that share.

    `local` is the default base of layers with a window, in families that have another there; `original` the default of
    the length trained for, in Phi-3, which keeps it beside the rope.
    """

    theta: float = 10_000.0
    partial: float = 1.0
    keys: tuple[str, str] = ('rope_theta', 'partial_rotary_factor')
    local: float = 0.0
    original: int = 0

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        theta_key, partial_key = self.keys
        said = {'rope_theta': theirs.take(theta_key, self.theta), 'partial': theirs.take(partial_key, self.partial)}
        scaling = theirs.inside('rope_scaling') | theirs.inside('rope_parameters')
        local = self._local(theirs, scaling)
        if self.original:
            scaling['original_max_position_embeddings'] = theirs.take('original_max_position_embeddings', self.original)
        theta = scaling.pop('rope_theta', said['rope_theta'])
        partial = scaling.pop('partial_rotary_factor', said['partial'])
        head_dim = theirs.take('head_dim', 0) or _head_dim(theirs)
        turned = int(head_dim * partial)
        return {
            'position': 'rope',
            'rope_theta': float(theta),
            'rope_dim': 0 if turned == head_dim else turned,
            'rope_scaling': read_scaling(scaling, theirs),
            **local,
        }

    def _local(self, theirs: Theirs, scaling: dict[str, Any]) -> Mapping[str, Any]:
        """The base of layers with a window; what is left of `scaling` is that of the others."""
        if not self.local:
            return {}
        base = theirs.take('rope_local_base_freq', self.local)
        slides = dict(scaling.pop('sliding_attention', None) or {})
        scaling |= scaling.pop('full_attention', None) or {}
        base = slides.pop('rope_theta', base)
        if read_scaling(slides, theirs) is not None:
            raise ConfigError('the rope of layers with a window is scaled, which is not implemented')
        return {'local_rope_theta': float(base)}

    def write(self, ours: Any) -> Mapping[str, Any]:
        theta_key, partial_key = self.keys
        theirs: dict[str, Any] = {theta_key: ours.rope_theta}
        if self.local:
            theirs['rope_local_base_freq'] = ours.local_rope_theta
        if self.partial != 1.0 or ours.rope_dim:
            theirs[partial_key] = _share(ours.rope_dim or ours.head_dim, ours.head_dim)
        if ours.rope_scaling:
            theirs['rope_scaling'] = write_scaling(ours.rope_scaling)
            if self.original:
                theirs |= _beside(theirs['rope_scaling'], ours.max_length)
        return theirs


def _share(turned: int, head_dim: int) -> float:
    """The share that comes back as `turned` when multiplied and cut."""
    share = turned / head_dim
    return share if int(head_dim * share) == turned else math.nextafter(share, 1.0)


def _beside(scaling: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Phi-3's spelling, of which versions of transformers before 5 take three keys and no more."""
    rest = dict(scaling)
    kind, original = rest.pop('rope_type'), rest.pop('original_max_position_embeddings', 0)
    if kind == 'longrope' and rest['attention_factor'] == _longrope_factor(longest / original, original):
        del rest['attention_factor']
    return {'original_max_position_embeddings': original, 'rope_scaling': {'type': kind, **rest}}


def _longrope_factor(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class LatentRope:
    """Of latent attention, whose `mscale_all_dim` sharpens all scores where texts are longer, besides what YaRN does to
    those of the part that turns. That part goes by the name of head_dim.
    """

    theta: float = 10_000.0

    def read(self, theirs: Theirs) -> Mapping[str, Any]:
        said = {'rope_theta': theirs.take('rope_theta', self.theta)}
        said |= theirs.inside('rope_scaling') | theirs.inside('rope_parameters')
        theta, weight = said.pop('rope_theta'), said.get('mscale_all_dim') or 0
        scaling = read_scaling(said, theirs)
        width = theirs.take('qk_nope_head_dim', 128) + theirs.take('qk_rope_head_dim', 64)
        scale = _sharpened(width, scaling.factor, weight) if isinstance(scaling, YaRN) and weight else 0.0
        return {
            'position': 'rope',
            'rope_theta': float(theta),
            'rope_scaling': scaling,
            'attention_scale': scale,
        }

    def write(self, ours: Any) -> Mapping[str, Any]:
        theirs: dict[str, Any] = {'rope_theta': ours.rope_theta, 'head_dim': ours.mla.rope_dim}
        if not ours.rope_scaling:
            return theirs
        said = write_scaling(ours.rope_scaling)
        if ours.attention_scale and isinstance(ours.rope_scaling, YaRN):
            width = ours.head_dim + ours.mla.rope_dim
            said['mscale_all_dim'] = _weight(width, ours.rope_scaling.factor, ours.attention_scale)
            if ours.rope_scaling.attention_factor == 1.0:
                said['mscale'] = said['mscale_all_dim']
                del said['attention_factor']
        return {**theirs, 'rope_scaling': said}


def _sharpened(width: int, factor: float, weight: float) -> float:
    """What scores of keys so wide are multiplied by."""
    mscale = _mscale(factor, weight)
    return width**-0.5 * mscale * mscale


def _weight(width: int, factor: float, scale: float) -> float:
    """The weight, of few digits if it has few, that sharpens to that scale. Raises ConfigError where none does."""
    if factor > 1:
        about = (math.sqrt(scale * width**0.5) - 1) / (0.1 * math.log(factor))
        for weight in (*(round(about, digits) for digits in range(1, 13)), *_neighbours(about)):
            if weight > 0 and _sharpened(width, factor, weight) == scale:
                return weight
    raise ConfigError(f'attention_scale = {scale} has no mscale_all_dim')


def _neighbours(x: float) -> Iterator[float]:
    """The floats around one, and it."""
    above = below = x
    for _ in range(9):
        yield above
        yield below
        above, below = math.nextafter(above, math.inf), math.nextafter(below, -math.inf)


def _head_dim(theirs: Theirs) -> int:
    for width, heads in (('hidden_size', 'num_attention_heads'), ('n_embd', 'n_head')):
        if theirs.get(width) and theirs.get(heads):
            return theirs[width] // theirs[heads]
    raise ConfigError('the config has no head_dim, and no width and heads to tell it')


def read_scaling(said: Mapping[str, Any], theirs: Theirs) -> RopeScaling | None:
    """Raises ConfigError for a kind or a key that we do not implement."""
    rest = {key: value for key, value in said.items() if value is not None}
    old, new = rest.pop('type', 'default'), rest.pop('rope_type', None)
    # Phi-3 called LongRope 'su' and 'yarn' first.
    kind = 'longrope' if 'long_factor' in rest else new or old
    if kind not in _READERS:
        raise ConfigError(f'rope_type = {kind!r} is not implemented; known are {", ".join(_READERS)}')
    longest = theirs.get('max_position_embeddings', 0)
    try:
        found = _READERS[kind](rest, rest.pop('original_max_position_embeddings', longest), longest)
    except KeyError as error:
        raise ConfigError(f'the rope of type {kind} has no {error.args[0]}') from None
    if rest:
        raise ConfigError(f'the rope of type {kind} has {", ".join(rest)}, which is not implemented')
    return found


def _linear(rest: dict[str, Any], original: int, longest: int) -> RopeScaling:
    del original, longest
    return Linear(factor=float(rest.pop('factor')))


def _dynamic(rest: dict[str, Any], original: int, longest: int) -> RopeScaling:
    del longest
    return DynamicNTK(factor=float(rest.pop('factor')), original_length=original)


def _llama3(rest: dict[str, Any], original: int, longest: int) -> RopeScaling:
    del longest
    names = ('factor', 'low_freq_factor', 'high_freq_factor')
    return Llama3(original_length=original, **{name: float(rest.pop(name)) for name in names})


def _yarn(rest: dict[str, Any], original: int, longest: int) -> RopeScaling:
    """What `mscale_all_dim` says of the scores is the attention's (`mscale_squared`)."""
    factor = float(rest.pop('factor', None) or longest / original)
    both = rest.pop('mscale', 0), rest.pop('mscale_all_dim', 0)
    if all(both):
        rest.setdefault('attention_factor', _mscale(factor, both[0]) / _mscale(factor, both[1]))
    return YaRN(
        factor=factor,
        original_length=original,
        beta_fast=float(rest.pop('beta_fast', 32)),
        beta_slow=float(rest.pop('beta_slow', 1)),
        attention_factor=float(rest.pop('attention_factor', 0.0)),
        truncate=bool(rest.pop('truncate', True)),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rest: dict[str, Any], original: int, longest: int) -> RopeScaling:
    factor = float(rest.pop('factor', None) or longest / original)
    return LongRope(
        short=tuple(map(float, rest.pop('short_factor'))),
        long=tuple(map(float, rest.pop('long_factor'))),
        original_length=original,
        attention_factor=float(rest.pop('attention_factor', None) or _longrope_factor(factor, original)),
    )


_READERS = {
    'default': lambda rest, original, longest: None,
    'linear': _linear,
    'dynamic': _dynamic,
    'llama3': _llama3,
    'yarn': _yarn,
    'longrope': _longrope,
}


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Raises ConfigError for one that transformers does not have."""
    match scaling:
        case Linear():
            return {'rope_type': 'linear', 'factor': scaling.factor}
        case DynamicNTK():
            kind, names = 'dynamic', {'factor': scaling.factor}
        case Llama3():
            names = {name: getattr(scaling, name) for name in ('factor', 'low_freq_factor', 'high_freq_factor')}
            kind = 'llama3'
        case YaRN():
            names = {name: getattr(scaling, name) for name in ('factor', 'beta_fast', 'beta_slow', 'truncate')}
            names |= {'attention_factor': scaling.attention_factor} if scaling.attention_factor else {}
            kind = 'yarn'
        case LongRope():
            kind = 'longrope'
            names = {'short_factor': list(scaling.short), 'long_factor': list(scaling.long)}
            names |= {'attention_factor': scaling.attention_factor}
        case _:
            raise ConfigError(f'transformers has no {type(scaling).__name__}')
    return {'rope_type': kind, 'original_max_position_embeddings': scaling.original_length, **names}

"""Sharding rules: tables from a tensor's dims to mesh axes, one set of tables per preset.

A key is one letter (`'F'`, wherever that dim stands) or a tensor's whole dims (`'BTF'`; a vector is written
`' D'`). The longest match wins. A letter's value is the axis or axes that split the dim; a whole tensor's value
has one entry a dim. What no key names is replicated. A leading `L` (layers of a scanned stack) is looked up by
itself, the rest as if it were not there.

A new layout is a new entry of `PRESETS`; no layer ever names a mesh axis.
"""

import dataclasses
from collections.abc import Mapping

Axes = str | tuple[str, ...] | None
Table = Mapping[str, Axes | tuple[Axes, ...]]

# Stages split the batch wherever they do not split the layers: before and after the stack.
BATCH = ('stage', 'data', 'fsdp', 'expert')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How each kind of tensor lies on the mesh."""

    params: Table
    gradients: Table
    optimizer: Table
    activations: Table
    decoding: Table  # activations while tokens are drawn, one by one
    cache: Table


# Weights split their wide dims over tensor (Megatron: Shoeybi et al., 2019, arXiv 1909.08053).
# Experts lie apart; the router knows them all.
_TENSOR: Table = {
    'V': 'tensor',
    'N': 'tensor',
    'K': 'tensor',
    'F': 'tensor',
    'P': 'tensor',
    'L': 'stage',
    'E': 'expert',
    ' E': (None,),
    'DE': (None, None),
}
# … and their width over fsdp, gathered layer by layer (ZeRO: Rajbhandari et al., 2020, arXiv 1910.02054).
# Vectors of the width are too small to be worth a gather.
# Latents (nn/mla.py) are the width of what is made from them.
_SHARDED: Table = {
    **_TENSOR,
    'D': 'fsdp',
    'Q': 'fsdp',
    'Z': 'fsdp',
    ' D': (None,),
    ' Q': (None,),
    ' Z': (None,),
    'DE': ('fsdp', None),
    'DQ': ('fsdp', None),
    'DZ': ('fsdp', None),
}

_ACTIVATIONS: Table = {
    'B': BATCH,
    'T': 'seq',
    'N': 'tensor',
    'K': 'tensor',
    'F': 'tensor',
    'P': 'tensor',
    'V': 'tensor',
    'VD': ('tensor', None),  # the embedding while it is looked up
}
_DECODING: Table = {**_ACTIVATIONS, 'T': None}
_CACHE: Table = {'B': BATCH, 'K': 'tensor', 'P': 'tensor'}


# Between attention and MLP the stream would lie whole on every device of `tensor`; split it is a fraction to save
# (T5X's two-dimensional activations, with which PaLM was trained: Roberts et al., 2022, arXiv 2203.17189).
_STREAM: Table = {**_ACTIVATIONS, 'BTD': (BATCH, 'seq', 'tensor')}


def _zero(*, params: Table, gradients: Table, activations: Table = _ACTIVATIONS) -> Rules:
    return Rules(
        params=params,
        gradients=gradients,
        optimizer=_SHARDED,
        activations=activations,
        decoding=_DECODING,
        cache=_CACHE,
    )


PRESETS: dict[str, Rules] = {
    'zero1': _zero(params=_TENSOR, gradients=_TENSOR),
    'zero2': _zero(params=_TENSOR, gradients=_SHARDED),
    'zero3': _zero(params=_SHARDED, gradients=_SHARDED),
    'zero3_stream': _zero(params=_SHARDED, gradients=_SHARDED, activations=_STREAM),
}

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

BATCH = ('data', 'fsdp', 'expert')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How each kind of tensor lies on the mesh."""

    params: Table
    gradients: Table
    optimizer: Table
    activations: Table
    cache: Table


# Weights split their wide dims over tensor (Megatron: Shoeybi et al., 2019, arXiv 1909.08053).
_TENSOR: Table = {'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'E': 'expert', 'L': 'stage'}
# … and their width over fsdp, gathered layer by layer (ZeRO: Rajbhandari et al., 2020, arXiv 1910.02054).
# Vectors of the width are too small to be worth a gather.
_SHARDED: Table = {**_TENSOR, 'D': 'fsdp', ' D': (None,)}

_ACTIVATIONS: Table = {'B': BATCH, 'T': 'seq', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'V': 'tensor'}
_CACHE: Table = {'B': BATCH, 'K': 'tensor'}


def _zero(*, params: Table, gradients: Table) -> Rules:
    return Rules(params=params, gradients=gradients, optimizer=_SHARDED, activations=_ACTIVATIONS, cache=_CACHE)


PRESETS: dict[str, Rules] = {
    'zero1': _zero(params=_TENSOR, gradients=_TENSOR),
    'zero2': _zero(params=_TENSOR, gradients=_SHARDED),
    'zero3': _zero(params=_SHARDED, gradients=_SHARDED),
}

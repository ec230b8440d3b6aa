"""Shape-typed array aliases and the batch: the only things every layer of the library shares.

Shapes are written in the alphabet of docs/architecture.md: B batch (sequences), T query length, S key-value
length, D width, V vocabulary and so on, as `Float[Array, 'B T D']`; a single letter is written `' D'`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ['AnyArray', 'Array', 'Batch', 'Bool', 'Float', 'Int', 'Key']

AnyArray = Array | np.ndarray  # on the device or on the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One global batch of packed rows. Position t of a row predicts `targets[t]` from `tokens[:t + 1]`.

    Padding has segment 0, weight 0 and target 0. Rows may hold several documents (segments 1, 2, …), which do
    not see each other; positions restart with each.
    """

    tokens: Int[AnyArray, 'B T']
    targets: Int[AnyArray, 'B T']
    weights: Float[AnyArray, 'B T']  # what each position counts for in the loss
    segments: Int[AnyArray, 'B T']  # 0 is padding; equal ids see each other
    positions: Int[AnyArray, 'B T']

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedBatch(Batch):
    """Rows of which some tokens are hidden: position t predicts `targets[t]` from all of its segment."""

    token_types: Int[AnyArray, 'B T']  # 1 in the second of two texts
    unrelated: Int[AnyArray, ' B']  # 1 where the second text is of another document, 0 where it follows the first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskBatch(Batch):
    """Rows of one document each, of several tasks."""

    tasks: Int[AnyArray, ' B']  # from 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefixBatch(Batch):
    """Rows in which every token sees the given beginning of its segment whole."""

    prefix: Bool[AnyArray, 'B T']  # what is given


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceBatch(Batch):
    """What an encoder reads, and, in the fields of a batch, what a decoder writes of each segment of it."""

    source: Int[AnyArray, 'B S']
    source_segments: Int[AnyArray, 'B S']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch(Batch):
    """Rows of whole examples, each of one text or of several that are compared; every text is a segment of its own."""

    values: Float[AnyArray, 'B T']  # of its text: label (1 or -1), score or margin; of process rewards see `marks`
    marks: Float[
        AnyArray, 'B T'
    ]  # 1 where a value counts: at a text's last pair, of process rewards at each step's last
    examples: Int[AnyArray, 'B T']  # which example of its row a position belongs to, from 1; 0 is padding
    reference: Float[AnyArray, 'B T']  # log p of each target under the reference, where it was computed before; else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch(Batch):
    """Responses that a policy wrote, a row each behind its prompt; weight 1 where the target is the response's.

    Every response begins at the same column: its targets are the first of the last A columns of its row. All further
    fields are of these, and mean something where the weight is 1. Log-probs are at the policy's temperature.
    """

    advantages: Float[AnyArray, 'B A']
    sampled: Float[AnyArray, 'B A']  # log p as the sampler drew them
    old: Float[AnyArray, 'B A'] | None = None  # log p of these weights by the trainer's numerics; None: they train now
    reference: Float[AnyArray, 'B A'] | None = None  # log p of the reference policy, where there is one
    values: Float[AnyArray, 'B A'] | None = None  # what the critic expected, where there is one
    returns: Float[AnyArray, 'B A'] | None = None  # what the critic is to expect


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaughtBatch(Batch):
    """Rows with what a teacher held likely at each position of weight above 0, as it was stored."""

    likely: Int[AnyArray, 'B T X']  # its likeliest tokens
    likely_log_probs: Float[AnyArray, 'B T X']
    rest: Float[AnyArray, 'B T']  # log of the probability of all others together

"""How long a run is: steps, tokens or epochs, all turned into steps."""

import math
from collections.abc import Sequence

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Documents
from tpu_llm.data.loader import Data


def run_steps(data: Data, docs: Sequence[Documents], *, steps: int = 0, tokens: int = 0, epochs: float = 0.0) -> int:
    """The number of steps; exactly one of the three lengths is given, and the last step is never cut short.

    Tokens are positions of rows, `global_batch * seq_len` a step. An epoch is as many positions as all sources together
    hold; it needs sources whose lengths are known (a cache, or files of tokens). Raises ConfigError.
    """
    given = {name: value for name, value in (('steps', steps), ('tokens', tokens), ('epochs', epochs)) if value}
    if len(given) != 1:
        raise ConfigError(f'give the length of the run once, in steps, tokens or epochs; it has {given or "none"}')
    if steps:
        return steps
    per_step = data.global_batch * data.seq_len
    return math.ceil((tokens or epochs * epoch_positions(data, docs)) / per_step)


def epoch_positions(data: Data, docs: Sequence[Documents]) -> int:
    """The positions that one pass over all sources fills, as `overlong` has it."""
    return sum(_positions(data, name, d) for name, d in zip(data.mixture.sources, docs, strict=True))


def _positions(data: Data, name: str, docs: Documents) -> int:
    lengths = docs.lengths()
    if lengths is None:
        raise ConfigError(f'the length of source {name!r} is unknown; set data.cache, or give steps or tokens')
    pairs = lengths + 1  # a document of n ids is n + 1 pairs
    if data.overlong == 'drop':
        pairs = pairs[pairs <= data.seq_len]
    elif data.overlong == 'truncate':
        pairs = np.minimum(pairs, data.seq_len)
    return int(pairs.sum())

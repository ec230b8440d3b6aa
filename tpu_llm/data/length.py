"""How long a run is: steps, tokens or epochs, all turned into steps."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Documents
from tpu_llm.data.examples import count_pairs, count_texts
from tpu_llm.data.loader import Data
from tpu_llm.data.packing import Waiting, fill_row
from tpu_llm.data.streams import fit, in_order


def run_steps(data: Data, docs: Sequence[Documents], *, steps: int = 0, tokens: int = 0, epochs: float = 0.0) -> int:
    """The number of steps; the caller gives one of the three lengths, and the last step is never cut short.

    Tokens are positions of rows, `global_batch * seq_len` a step. An epoch is as many positions as all sources together
    hold; of text it needs lengths that are known (a cache, or files of tokens). Raises ConfigError.
    """
    if steps:
        return steps
    per_step = data.global_batch * data.seq_len
    return math.ceil((tokens or epochs * epoch_positions(data, docs)) / per_step)


def epoch_positions(data: Data, docs: Sequence[Documents]) -> int:
    """The positions that one pass over all sources fills, as `overlong` has it; of whole documents with padding."""
    return sum(_positions(data, name, d) for name, d in zip(data.mixture.sources, docs, strict=True))


def _positions(data: Data, name: str, docs: Documents) -> int:
    if docs.kind != 'text':
        sizes = _example_sizes(data, docs)
    elif data.whole:
        sizes = ((pairs, 1) for pairs in _text_pairs(data, name, docs).tolist())
    else:
        return int(_text_pairs(data, name, docs).sum())
    reading, waiting, rows = (Waiting(pairs, texts, None) for pairs, texts in sizes), list[Waiting](), 0
    while fill_row(waiting, lambda: next(reading, None), data.seq_len, data.most_texts):
        rows += 1
    return rows * data.seq_len


def _text_pairs(data: Data, name: str, docs: Documents) -> np.ndarray:
    lengths = docs.lengths()
    if lengths is None:
        raise ConfigError(f'the length of source {name!r} is unknown; set data.cache, or give steps or tokens')
    pairs = lengths + 1  # a document of n ids is n + 1 pairs
    if data.overlong == 'drop':
        pairs = pairs[pairs <= data.seq_len]
    elif data.overlong == 'truncate':
        pairs = np.minimum(pairs, data.seq_len)
    return pairs


def _example_sizes(data: Data, docs: Documents) -> Iterator[tuple[int, int]]:
    """Of all examples, which are read and written for it."""
    for number, document in in_order(docs):
        assert document.pairs is not None, 'examples that are not encoded'
        kept = fit(document.pairs, docs, number, data.seq_len, data.overlong, data.most_texts)
        if kept is not None:
            yield count_pairs(kept), count_texts(kept)

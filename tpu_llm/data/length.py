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

FEW = 10  # steps; fewer are hardly what is meant by some epochs


def run_steps(data: Data, docs: Sequence[Documents], *, steps: int = 0, tokens: int = 0, epochs: float = 0.0) -> int:
    """The number of steps; the caller gives one of the three lengths, and the last step is never cut short.

    Tokens are positions of rows, `global_batch * seq_len` a step. An epoch is as many positions as all sources together
    hold; of text it needs lengths that are known (a cache, or files of tokens). Raises ConfigError.
    """
    if steps:
        return steps
    per_step = data.global_batch * data.seq_len
    return math.ceil((tokens or epochs * epoch_positions(data, docs)) / per_step)


def few_steps(data: Data, docs: Sequence[Documents], *, steps: int, epochs: float) -> str:
    """What is to be said where the epochs of a run are few steps: rows are full, however little there is to read. Else
    ''.
    """
    if not epochs or not 0 < steps < FEW:
        return ''
    per_step = data.global_batch * data.seq_len
    tokens = sum(pairs for name, d in _named(data, docs) for pairs, _ in _sizes(data, name, d))
    return (
        f'{epochs:g} {"epoch" if epochs == 1 else "epochs"} of {tokens:,} tokens are {steps} '
        f'{"step" if steps == 1 else "steps"} of {per_step:,}, in which each document stands about '
        f'{steps * per_step / tokens:.0f} times; give smaller data.seq_len and data.global_batch, or set steps'
    )


def epoch_positions(data: Data, docs: Sequence[Documents]) -> int:
    """The positions that one pass over all sources fills, as `overlong` has it; of whole documents with padding."""
    return sum(_positions(data, name, d) for name, d in _named(data, docs))


def _named(data: Data, docs: Sequence[Documents]) -> Iterator[tuple[str, Documents]]:
    return zip(data.mixture.sources, docs, strict=True)


def _positions(data: Data, name: str, docs: Documents) -> int:
    if docs.kind == 'text' and not data.whole:
        return int(_text_pairs(data, name, docs).sum())
    sizes = _sizes(data, name, docs)
    reading, waiting, rows = (Waiting(pairs, texts, None) for pairs, texts in sizes), list[Waiting](), 0
    while fill_row(waiting, lambda: next(reading, None), data.seq_len, data.most_texts):
        rows += 1
    return rows * data.seq_len


def _sizes(data: Data, name: str, docs: Documents) -> Iterator[tuple[int, int]]:
    """Pairs and texts of every document that is read."""
    if docs.kind != 'text':
        return _example_sizes(data, docs)
    return ((pairs, 1) for pairs in _text_pairs(data, name, docs).tolist())


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

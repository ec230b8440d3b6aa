"""Documents into rows of T positions, with segments and positions.

A document d1 … dn is n + 1 pairs of input and target: inputs `bos d1 … dn`, targets `d1 … dn eos`. With its marks
it is the array `ids = [bos, d1, …, dn, eos]`, and pair i is `(ids[i], ids[i + 1])`. Each pair is in exactly one
row. A document that does not fit goes on in the next row, as a new segment whose positions start at 0 again:

    row 0   bos a1 a2 a3 | bos b1 b2      targets  a1 a2 a3 eos | b1 b2 b3      segments  1 1 1 1 2 2 2
    row 1   b3 b4 | bos c1 c2 c3 c4       targets  b4 eos | c1 c2 c3 c4 eos     segments  1 1 2 2 2 2 2
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tpu_llm.arrays import Batch
from tpu_llm.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Pairs `[start, stop)` of one document."""

    ids: np.ndarray  # with bos and eos
    start: int
    stop: int
    source: int = 0  # which of the mixture's sources it is from
    document: int = 0  # and which of its documents


def frame(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """`[bos, tokens…, eos]`, int32."""
    ids = np.empty(len(tokens) + 2, np.int32)
    ids[0], ids[1:-1], ids[-1] = tokenizer.bos, tokens, tokenizer.eos
    return ids


def rows(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[list[Piece]]:
    """Framed documents in order, each pair once; the last row may be short."""
    row: list[Piece] = []
    free = seq_len
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            stop = min(start + free, len(ids) - 1)
            row.append(Piece(ids, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield row
                row, free = [], seq_len
    if row:
        yield row


def fill(packed: Sequence[Sequence[Piece]], count: int, seq_len: int, pad: int) -> Batch:
    """A batch of `count` rows; what the pieces leave free is padding (segment, weight and target 0)."""
    tokens = np.full((count, seq_len), pad, np.int32)
    targets, segments, positions = (np.zeros((count, seq_len), np.int32) for _ in range(3))
    for r, row in enumerate(packed):
        left = 0
        for segment, (ids, start, stop, *_) in enumerate(row, 1):
            right = left + stop - start
            tokens[r, left:right] = ids[start:stop]
            targets[r, left:right] = ids[start + 1 : stop + 1]
            segments[r, left:right] = segment
            positions[r, left:right] = np.arange(stop - start)
            left = right
    weights = (segments > 0).astype(np.float32)
    return Batch(tokens=tokens, targets=targets, weights=weights, segments=segments, positions=positions)

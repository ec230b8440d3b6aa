"""Documents into rows of T positions, with segments and positions.

A document d1 … dn is n + 1 pairs of input and target: inputs `bos d1 … dn`, targets `d1 … dn eos`. With its marks
it is the array `ids = [bos, d1, …, dn, eos]`, and pair i is `(ids[i], ids[i + 1])`. Each pair is in exactly one
row. A document that does not fit goes on in the next row, as a new segment whose positions start at 0 again:

    row 0   bos a1 a2 a3 | bos b1 b2      targets  a1 a2 a3 eos | b1 b2 b3      segments  1 1 1 1 2 2 2
    row 1   b3 b4 | bos c1 c2 c3 c4       targets  b4 eos | c1 c2 c3 c4 eos     segments  1 1 2 2 2 2 2

Packed whole, a document is never divided, and what no waiting one fits in is padding. Examples of post-training
(`examples`) are packed so, each of their texts as a segment:

    row 0   prompt yes | prompt no | · ·  targets  … yes eos | … no eos | · ·   segments  1 1 1 2 2 2 0 0
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpu_llm.arrays import Batch
from tpu_llm.data.examples import PAIR, count_pairs, count_texts
from tpu_llm.data.tokenizer import Tokenizer

WAITING = 8  # whole documents among which a row chooses; 1 leaves 5 to 23 % of rows empty, 8 0.2 to 5 %


class Piece(NamedTuple):
    """Pairs `[start, stop)` of one document."""

    ids: np.ndarray  # with bos and eos; or an example's pairs
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


class Waiting(NamedTuple):
    """A whole document that waits for a row."""

    pairs: int
    texts: int
    what: Any


def fill_row(
    waiting: list[Waiting], draw: Callable[[], Waiting | None], seq_len: int, most_texts: int
) -> list[Waiting]:
    """A row of whole documents: the one that has waited longest, then always the longest that still fits.

    Takes them out of `waiting`, which `draw` keeps at `WAITING` documents until it gives None. A row holds no more than
    `most_texts` texts (0: any number). Each document alone must fit.
    """
    row: list[Waiting] = []
    free, texts = seq_len, most_texts
    while True:
        while len(waiting) < WAITING and (drawn := draw()) is not None:
            waiting.append(drawn)
        fitting = [j for j, w in enumerate(waiting) if w.pairs <= free and (not most_texts or w.texts <= texts)]
        if not fitting:
            assert row or not waiting, 'a document is longer than a row'
            return row
        row.append(waiting.pop(max(fitting, key=lambda j: waiting[j].pairs) if row else 0))
        free, texts = free - row[-1].pairs, texts - row[-1].texts


def whole_rows(documents: Iterable[np.ndarray], seq_len: int, most_texts: int) -> Iterator[list[Piece]]:
    """Documents that are not divided, each once, nearly in order; each must fit in a row."""
    reading, waiting = iter(documents), list[Waiting]()

    def draw() -> Waiting | None:
        document = next(reading, None)
        return None if document is None else Waiting(count_pairs(document), count_texts(document), document)

    while row := fill_row(waiting, draw, seq_len, most_texts):
        yield [Piece(w.what, 0, w.pairs) for w in row]


class Placed(NamedTuple):
    """A whole document in a batch."""

    number: int
    ids: np.ndarray
    row: int
    columns: slice


def passing(
    documents: Iterable[tuple[int, np.ndarray]], count: int, seq_len: int, pad: int
) -> Iterator[tuple[Batch, list[Placed]]]:
    """Batches of `count` rows of whole documents, each once, and where in them each numbered document is."""
    numbers: dict[int, int] = {}  # by the identity of the array: rows may take a later document first

    def reading() -> Iterator[np.ndarray]:
        for number, ids in documents:
            numbers[id(ids)] = number
            yield ids

    packed = whole_rows(reading(), seq_len, 0)
    while group := list(itertools.islice(packed, count)):
        placed = []
        for row, pieces in enumerate(group):
            ends = itertools.accumulate(piece.stop for piece in pieces)
            for piece, end in zip(pieces, ends, strict=True):
                placed.append(Placed(numbers.pop(id(piece.ids)), piece.ids, row, slice(end - piece.stop, end)))
        yield fill(group, count, seq_len, pad), placed


def fill(packed: Sequence[Sequence[Piece]], count: int, seq_len: int, pad: int) -> Batch:
    """A batch of `count` rows; what the pieces leave free is padding (segment, weight and target 0)."""
    tokens = np.full((count, seq_len), pad, np.int32)
    targets, segments, positions = (np.zeros((count, seq_len), np.int32) for _ in range(3))
    weights = np.zeros((count, seq_len), np.float32)
    for r, row in enumerate(packed):
        left, segment = 0, 1
        for ids, start, stop, *_ in row:
            right = left + stop - start
            here = (r, slice(left, right))
            segments[here], weights[here] = segment, 1.0
            if ids.dtype == PAIR:
                tokens[here], targets[here], weights[here] = ids['token'], ids['target'], ids['weight']
                segments[here] += ids['text']
                positions[here] = ids['position']
            else:
                tokens[here], targets[here] = ids[start:stop], ids[start + 1 : stop + 1]
                positions[here] = np.arange(stop - start)
            left, segment = right, segment + count_texts(ids)
    return Batch(tokens=tokens, targets=targets, weights=weights, segments=segments, positions=positions)

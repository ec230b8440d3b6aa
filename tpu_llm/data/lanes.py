"""Lanes: the fixed walks over documents of which the rows of every global batch are made.

A batch of G rows has L = G * interleave lanes: lanes j, j + G, j + 2 G … take turns at row j, one step each. Lane j
reads, as its c-th document of a source, document `c * L + j` of that source's endless shuffled stream. So lanes
never share a document within an epoch, and together they read each stream without a gap. A lane takes its next
document from the source that lags its weight most (`mixture.most_behind`), counted in tokens since the stage began.
Lanes start with different pseudo-random debts, so that they do not all turn to the same source at once.

Interleaving is for documents that span many rows: without it a row's place reads one of them for as many steps on
end, and neighbouring batches hold the same few documents. The first 300 steps of the quickstart come to 2.02 bits a
byte with 1 open document to a row, 1.87 with 8, 1.81 with 32.

Packed whole, a lane holds a few documents that wait for a row (`packing.fill_row`); which they are is state, too.

The state of a lane is a few integers (its step, the documents and tokens taken of each source, and where in which
document it stands); the states of all lanes are the *lane table*, which a checkpoint stores and any split over hosts
and workers can go on from.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data import packing
from tpu_llm.data.examples import count_pairs, count_texts
from tpu_llm.data.mixture import Mixture, most_behind, uniform
from tpu_llm.data.packing import WAITING, Piece, Waiting
from tpu_llm.data.streams import Overlong, Stream

Table = dict[str, np.ndarray]

_NONE = -1  # `source` of a lane that stands between two documents
_IN_VAIN = 1000  # documents in a row that may be unusable before the source is called so


def initial(lanes: Iterable[int], sources: int, *, whole: bool = False) -> Table:
    """The table before the first step."""
    lane = np.asarray(sorted(lanes), np.int64)
    n = len(lane)
    waiting = np.full((n, WAITING, 2), _NONE, np.int64)  # source, and which of the documents taken of it; oldest first
    return ({'waiting': waiting} if whole else {}) | {
        'lane': lane,
        'step': np.zeros(n, np.int64),
        'source': np.full(n, _NONE, np.int64),
        'offset': np.zeros(n, np.int64),
        'drawn': np.zeros((n, sources), np.int64),  # documents taken of each source
        'emitted': np.zeros((n, sources), np.int64),  # pairs put into rows of each source in this stage
    }


def merge(tables: Sequence[Table]) -> Table:
    """One table of the lanes of several readers at the same step, sorted by lane."""
    joined = {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}
    joined = {key: column[np.argsort(joined['lane'])] for key, column in joined.items()}
    assert len(np.unique(joined['lane'])) == len(joined['lane']), 'two tables hold the same lane'
    assert len(np.unique(joined['step'])) == 1, 'the tables are of different steps'
    return joined


def select(table: Table, lanes: Iterable[int]) -> Table:
    """The rows of some lanes, sorted. Raises ConfigError on a lane that the table does not hold."""
    at = {int(lane): row for row, lane in enumerate(table['lane'])}
    wanted = sorted(int(lane) for lane in lanes)
    missing = [lane for lane in wanted if lane not in at]
    if missing:
        raise ConfigError(
            f'the lane table has no lane {missing[0]}; go on with the global_batch and interleave it was saved with'
        )
    return {key: column[[at[lane] for lane in wanted]] for key, column in table.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What all lanes of a run have in common."""

    mixture: Mixture
    seed: int
    global_batch: int
    interleave: int
    seq_len: int
    overlong: Overlong
    whole: bool = False  # documents are never divided; what they leave of a row is padding
    most_texts: int = 0  # in such a row; 0: any number

    @property
    def lanes(self) -> int:
        return self.global_batch * self.interleave

    def of_rows(self, rows: Iterable[int]) -> list[int]:
        """The lanes that take turns at some rows."""
        return sorted(row + turn * self.global_batch for row in rows for turn in range(self.interleave))


class Walk:
    """Some lanes, walked one step at a time; whoever has a row's lane has all that take turns at it."""

    def __init__(self, plan: Plan, streams: Sequence[Stream], table: Table):
        assert len(streams) == table['drawn'].shape[1] == len(plan.mixture.sources)
        self._plan = plan
        self._names = list(plan.mixture.sources)
        self._streams = streams
        self._stages = plan.mixture.stages()
        self._table = {key: column.copy() for key, column in table.items()}
        self._documents: list[tuple[np.ndarray, int] | None] = [None] * len(table['lane'])
        self._waiting: list[list[Waiting]] = [[] for _ in table['lane']]
        turns = table['lane'] // plan.global_batch
        self._turns = [np.flatnonzero(turns == turn).tolist() for turn in range(plan.interleave)]
        phases = [stream.mean_length() if len(streams) > 1 else 0.0 for stream in streams]
        self._debts = [
            [uniform(plan.seed, 'debt', lane, name) * phase for name, phase in zip(self._names, phases, strict=True)]
            for lane in table['lane'].tolist()
        ]

    def another(self, piece: Piece, generator: np.random.Generator) -> np.ndarray:
        """The framed ids of another document of the piece's source. Raises ConfigError where there is none."""
        return self._streams[piece.source].another(piece.ids, generator)

    def state(self) -> Table:
        return {key: column.copy() for key, column in self._table.items()}

    def step(self) -> list[list[Piece]]:
        """The next row of each place in the batch, as the pieces that fill it."""
        done = int(self._table['step'][0])
        if any(done == first for first, _ in self._stages):
            self._table['emitted'][:] = 0
        rows = [self._row(i) for i in self._turns[done % self._plan.interleave]]
        self._table['step'] += 1
        return rows

    def _row(self, i: int) -> list[Piece]:
        if self._plan.whole:
            return self._whole_row(i)
        table, row, free = self._table, [], self._plan.seq_len
        while free:
            ids, document = self._current(i)
            source, start = int(table['source'][i]), int(table['offset'][i])
            stop = min(start + free, count_pairs(ids))
            row.append(Piece(ids, start, stop, source, document))
            free -= stop - start
            table['emitted'][i, source] += stop - start
            table['offset'][i] = stop
            if stop == count_pairs(ids):
                table['source'][i], table['offset'][i], self._documents[i] = _NONE, 0, None
        return row

    def _whole_row(self, i: int) -> list[Piece]:
        waiting = self._waiting[i]
        if not waiting:  # at the start, or after a restore
            known = self._table['waiting'][i].tolist()
            waiting += [self._wait(source, drawn, self._take(i, source, drawn)) for source, drawn in known if drawn > 0]
        row = packing.fill_row(waiting, lambda: self._draw_whole(i), self._plan.seq_len, self._plan.most_texts)
        self._table['waiting'][i] = [(source, drawn) for *_, (source, drawn, *_) in waiting]
        return [Piece(ids, 0, w.pairs, source, document) for w in row for source, _, ids, document in [w.what]]

    def _draw_whole(self, i: int) -> Waiting:
        source = self._next_source(i)
        drawn = self._draw(i, source)
        waiting = self._wait(source, int(self._table['drawn'][i, source]), drawn)
        self._table['emitted'][i, source] += waiting.pairs
        return waiting

    def _wait(self, source: int, drawn: int, document: tuple[np.ndarray, int] | None) -> Waiting:
        assert document is not None, 'a document that was read before is gone'
        ids, number = document
        return Waiting(count_pairs(ids), count_texts(ids), (source, drawn, ids, number))

    def _current(self, i: int) -> tuple[np.ndarray, int]:
        """The document in which lane i stands, and its number; the next one if the lane stands between two."""
        if self._table['source'][i] == _NONE:
            source = self._next_source(i)
            self._table['source'][i] = source
            self._documents[i] = self._draw(i, source)
        elif self._documents[i] is None:  # after a restore
            source = int(self._table['source'][i])
            self._documents[i] = self._take(i, source, int(self._table['drawn'][i, source]))
        document = self._documents[i]
        assert document is not None, 'a document that was read before is gone'
        return document

    def _next_source(self, i: int) -> int:
        step = self._table['step'][i]
        weights = next(weights for first, weights in reversed(self._stages) if first <= step)
        emitted = self._table['emitted'][i] + np.asarray(self._debts[i])
        return most_behind(emitted.tolist(), weights)

    def _draw(self, i: int, source: int) -> tuple[np.ndarray, int]:
        """The next usable document of a source for lane i, and its number."""
        for _ in range(_IN_VAIN):
            self._table['drawn'][i, source] += 1
            document = self._take(i, source, int(self._table['drawn'][i, source]))
            if document is not None:
                return document
        raise ConfigError(self._unusable(source))

    def _unusable(self, source: int) -> str:
        """What is to be said of a source of which no document is usable."""
        stream, mend = self._streams[source], 'a longer seq_len' if self._plan.whole else "overlong='split'"
        pairs = [count_pairs(ids) for n in range(min(len(stream), _IN_VAIN)) if (ids := stream.ids(n)) is not None]
        lengths = f'{min(pairs):,} to {max(pairs):,} positions long' if pairs else 'all bad'
        first = f', the first {_IN_VAIN:,} of them' if len(stream) > _IN_VAIN else ','
        return (
            f'{_IN_VAIN:,} draws in a row from source {self._names[source]!r} gave no document that fits seq_len = '
            f'{self._plan.seq_len:,}: it has {len(stream):,}{first} {lengths}; mend the source or use {mend}'
        )

    def _take(self, i: int, source: int, drawn: int) -> tuple[np.ndarray, int] | None:
        """The document that lane i drew as its `drawn`-th, as `overlong` wants it, and its number; None if unusable."""
        stream = self._streams[source]
        number = stream.number((drawn - 1) * self._plan.lanes + int(self._table['lane'][i]))
        ids = stream.fitting(number, self._plan.seq_len, self._plan.overlong, self._plan.most_texts)
        return None if ids is None else (ids, number)

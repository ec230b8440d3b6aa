"""What a run reads, and the loader that hands it out as batches.

A loader owns some lanes. It yields `(batch, table)`, where the table is the state of its lanes after that batch,
and goes on from any such table. Reading, tokenizing and packing run in a thread (`workers=0`) or in that many
processes; neither the number of workers nor that of hosts changes a byte.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from tpu_llm.arrays import Batch
from tpu_llm.config import ConfigError, machine
from tpu_llm.data import cache, lanes, pipeline
from tpu_llm.data.documents import Documents, is_remote
from tpu_llm.data.lanes import Overlong, Table
from tpu_llm.data.mixture import Mixture, most_behind
from tpu_llm.data.packing import Piece
from tpu_llm.data.streams import Stream, shuffled
from tpu_llm.data.tokenizer import Bytes, Ids, Pretrained, Tokenizer, TrainedBPE


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    """What a run reads and how it is packed."""

    mixture: Mixture
    tokenizer: TrainedBPE | Pretrained | Bytes | Ids
    global_batch: int  # rows of a batch, over all hosts
    seq_len: int  # positions of a row
    interleave: int = 8  # documents open at once in each row's place, read in turn
    overlong: Overlong = 'split'  # what becomes of documents longer than a row
    cache: str = machine('')  # folder for tokenized sources, in the workdir unless absolute; '' tokenizes on the fly
    workers: int = machine(0)  # processes that read and tokenize; 0 is a thread of this one
    prefetch: int = machine(2)  # batches made ahead

    def validate(self) -> None:
        for name in ('global_batch', 'seq_len', 'interleave', 'prefetch'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        if self.workers < 0:
            raise ConfigError(f'workers is {self.workers}; it is 0 for a thread, or a number of processes')

    def plan(self, seed: int) -> lanes.Plan:
        return lanes.Plan(self.mixture, seed, self.global_batch, self.interleave, self.seq_len, self.overlong)


def open_tokenizer(data: Data, workdir: epath.PathLike) -> Tokenizer:
    """The tokenizer of a run; one that must be trained learns from the mixture's first stage, in its proportions."""
    return data.tokenizer.make(_texts(data.mixture), workdir)


def _texts(mixture: Mixture) -> Iterator[str]:
    _, weights = mixture.stages()[0]
    readers = [shuffled(_not_empty(name, source.open())) for name, source in mixture.sources.items()]
    taken = [0] * len(readers)
    while any(weights):
        source = most_behind(taken, weights)
        text = next((d.text for d in readers[source] if d.text), None)
        if text is None:
            weights[source] = 0.0  # all read
        else:
            taken[source] += len(text)
            yield text


def open_documents(data: Data, tokenizer: Tokenizer, workdir: epath.PathLike) -> list[Documents]:
    """The mixture's sources in order, through the cache if there is one. Raises ConfigError on an empty source."""
    folder = epath.Path(workdir) / data.cache
    if is_remote(folder):  # the cache is read by mapping it into memory
        folder = Path(tempfile.gettempdir()) / 'tpu_llm-cache'
    opened = []
    for name, source in data.mixture.sources.items():
        docs = source.open()
        if data.cache and not docs.tokenized:
            docs = cache.cached(docs, tokenizer, folder)
        opened.append(_not_empty(name, docs))
    return opened


def _not_empty(name: str, docs: Documents) -> Documents:
    if not len(docs):
        raise ConfigError(f'source {name!r} holds no document; check its paths')
    return docs


def make_walk(data: Data, docs: Sequence[Documents], tokenizer: Tokenizer, seed: int, table: Table) -> lanes.Walk:
    """The walk of a table's lanes."""
    streams = [Stream(name, d, tokenizer, seed) for name, d in zip(data.mixture.sources, docs, strict=True)]
    return lanes.Walk(data.plan(seed), streams, table)


class Loader:
    """Endless iterator over `(batch, table)`; a batch holds the owned rows (all by default), in order.

    Arrays are NumPy, `[rows, T]`: weights float32, all others int32. Training rows are full, so every weight is 1.
    """

    def __init__(
        self,
        data: Data,
        docs: Sequence[Documents],
        tokenizer: Tokenizer,
        *,
        seed: int,
        owned: Iterable[int] | None = None,
    ):
        self._data, self._pad, self._plan = data, tokenizer.pad, data.plan(seed)
        self._owned = list(range(data.global_batch)) if owned is None else sorted(map(int, owned))
        self._table = lanes.initial(self._plan.of_rows(self._owned), len(docs))
        self._walk = functools.partial(make_walk, data, docs, tokenizer, seed)
        self._ahead: pipeline.Closing | None = None

    def restore(self, table: Table) -> None:
        """Goes on after the step at which the table was taken; it may hold lanes of other hosts as well.

        Raises ConfigError where the table is of another global_batch, interleave or number of sources.
        """
        if table['lane'].max() >= self._plan.lanes:
            raise ConfigError(
                f'the lane table has {table["lane"].max() + 1} lanes, global_batch x interleave is {self._plan.lanes}; '
                'go on with those of the run that saved it'
            )
        if table['drawn'].shape[1] != self._table['drawn'].shape[1]:
            raise ConfigError(
                f'the lane table was drawn from {table["drawn"].shape[1]} sources, the mixture has '
                f'{self._table["drawn"].shape[1]}; go on with the mixture of the run that saved it'
            )
        self.close()
        self._table = lanes.select(table, self._plan.of_rows(self._owned))

    def __iter__(self) -> 'Loader':
        return self

    def __next__(self) -> tuple[Batch, Table]:
        if self._ahead is None:
            rows = pipeline.Rows(self._walk, self._table, plan=self._plan, pad=self._pad)
            workers = min(self._data.workers, len(self._owned))
            self._ahead = pipeline.read_ahead(rows, workers=workers, prefetch=self._data.prefetch)
        arrays = next(self._ahead)
        self._table = arrays.pop('state')
        return Batch(weights=np.ones(arrays['tokens'].shape, np.float32), **arrays), self._table

    def describe(self, step: int) -> list[list[Piece]]:
        """The pieces of each owned row in the batch of a step, counted from 1 as in `metrics.jsonl`.

        Walks there from where the loader stands, which it leaves as it is. Raises ConfigError on a step behind it.
        """
        done = int(self._table['step'][0])
        if step <= done:
            raise ConfigError(f'step {step} is behind the loader, which stands after step {done}; steps count from 1')
        walk = self._walk(self._table)
        for _ in range(step - done - 1):
            walk.step()
        return walk.step()

    def close(self) -> None:
        """Stops the thread or the workers; the next batch would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

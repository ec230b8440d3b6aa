"""The endless shuffled stream of one source as framed ids, and passes over a source; both are read through Grain."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from tpu_llm.data.documents import Document, Documents, tokens_of
from tpu_llm.data.packing import frame
from tpu_llm.data.shuffle import Shuffle
from tpu_llm.data.tokenizer import Tokenizer

_SAMPLE = 16


class Stream:
    """Index i of the stream is a document: every epoch is another permutation of the source, a function of the seed."""

    def __init__(self, name: str, docs: Documents, tokenizer: Tokenizer, seed: int):
        self._order = Shuffle(len(docs), seed, name)
        self._read = grain.MapDataset.source(docs)
        self._docs = docs
        self._tokenizer = tokenizer

    def number(self, index: int) -> int:
        """Which of the source's documents is at an index of the stream."""
        return self._order[index]

    def name(self, number: int) -> str:
        return self._docs.name(number)

    def ids(self, number: int) -> np.ndarray | None:
        """`[bos, …, eos]`, int32; None for a bad record that is skipped."""
        document: Document | None = self._read[number]
        if document is None:
            return None
        name = functools.partial(self._docs.name, number)
        return frame(tokens_of(document, self._tokenizer, name), self._tokenizer)

    def mean_length(self) -> float:
        """In pairs, of the first documents of the stream: the scale of the lanes' debts."""
        first = [self.ids(self.number(index)) for index in range(min(_SAMPLE, len(self._docs)))]
        lengths = [len(ids) - 1 for ids in first if ids is not None]
        return sum(lengths) / max(len(lengths), 1)


def in_order(docs: Documents) -> Iterator[tuple[int, Document]]:
    """Every document that can be read, with its number."""
    for number, document in enumerate(_ahead(grain.MapDataset.source(docs))):
        if document is not None:
            yield number, document


def shuffled(docs: Documents) -> Iterator[Document]:
    """Every document that can be read, once, in an order that depends on their number alone."""
    order = Shuffle(len(docs), 'sample')
    numbers = grain.MapDataset.range(len(docs))
    return (document for document in _ahead(numbers.map(lambda i: docs[order[i]])) if document is not None)


def _ahead(dataset: grain.MapDataset) -> Iterator[Document | None]:
    """Reads ahead with a few threads: what is remote answers slowly."""
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=32)
    iterator = iter(dataset.to_iter_dataset(options, allow_nones=True))
    try:
        yield from iterator
    finally:
        iterator.close()

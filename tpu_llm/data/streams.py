"""The endless shuffled stream of one source as framed ids, and passes over a source; both are read through Grain."""

import functools
from collections.abc import Iterator
from typing import Literal

import grain
import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Document, Documents, say_skipped, tokens_of
from tpu_llm.data.examples import PAIR, count_pairs, count_texts, cut
from tpu_llm.data.packing import frame
from tpu_llm.data.shuffle import Shuffle
from tpu_llm.data.tokenizer import Tokenizer

Overlong = Literal['split', 'truncate', 'drop', 'stop']

_SAMPLE = 16
_IN_VAIN = 1000  # documents in a row that may be unusable before the source is called so


class Stream:
    """Index i of the stream is a document: every epoch is another permutation of the source, a function of the seed."""

    def __init__(self, name: str, docs: Documents, tokenizer: Tokenizer, seed: int):
        self._order = Shuffle(len(docs), seed, name)
        self._read = grain.MapDataset.source(docs)
        self._docs = docs
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._docs)

    def number(self, index: int) -> int:
        """Which of the source's documents is at an index of the stream."""
        return self._order[index]

    def name(self, number: int) -> str:
        return self._docs.name(number)

    def ids(self, number: int) -> np.ndarray | None:
        """`[bos, …, eos]`, int32, or an example's pairs; None for a bad record that is skipped."""
        document: Document | None = self._read[number]
        if document is None:
            return None
        if document.pairs is not None:
            return document.pairs
        name = functools.partial(self._docs.name, number)
        return frame(tokens_of(document, self._tokenizer, name), self._tokenizer)

    def fitting(self, number: int, length: int, overlong: Overlong, most_texts: int = 0) -> np.ndarray | None:
        """`ids` as `fit` has them; None for what cannot be used."""
        ids = self.ids(number)
        return None if ids is None else fit(ids, self._docs, number, length, overlong, most_texts)

    def another(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The ids of a random document that are not these, and more than marks. Raises ConfigError where none is."""
        for _ in range(_IN_VAIN):
            found = self.ids(int(generator.integers(len(self._docs))))
            if found is not None and len(found) > 2 and not np.array_equal(found, ids):
                return found
        raise ConfigError(f'{_IN_VAIN} documents in a row of a source are bad, empty or the same; mend the source')

    def mean_length(self) -> float:
        """In pairs, of the first documents of the stream: the scale of the lanes' debts."""
        first = [self.ids(self.number(index)) for index in range(min(_SAMPLE, len(self._docs)))]
        lengths = [count_pairs(ids) for ids in first if ids is not None]
        return sum(lengths) / max(len(lengths), 1)


def fit(
    ids: np.ndarray, docs: Documents, number: int, length: int, overlong: Overlong, most_texts: int
) -> np.ndarray | None:
    """A document of no more than `length` pairs, unless it may be split; None where it is dropped.

    An example that is dropped is named in the log. Raises ConfigError where `overlong` says stop, and for an example
    of more than `most_texts` (0: any number).
    """
    if 0 < most_texts < count_texts(ids):
        raise ConfigError(
            f'{docs.name(number)} has {count_texts(ids)} texts, and a row takes {most_texts}; raise data.form.most'
        )
    if overlong == 'split' or count_pairs(ids) <= length:
        return ids
    longer = f'{docs.name(number)} is {count_pairs(ids)} positions long, more than the context of {length}'
    example = ids.dtype == PAIR
    if overlong == 'stop':
        others = "'truncate' or 'drop'" if example else "'split', 'truncate' or 'drop'"
        raise ConfigError(f'{longer}; use overlong={others}, or a longer seq_len')
    if not example:
        return ids[: length + 1] if overlong == 'truncate' else None
    kept = cut(ids, length) if overlong == 'truncate' and docs.kind == 'conversation' else None
    if kept is None:
        say_skipped(longer)
    return kept


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

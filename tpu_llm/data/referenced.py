"""Examples with the log-probs of a frozen model, computed once: `reference.bin` and `spans.npy` in a folder.

As in `cache`, the folder's name says what it was made of, it appears whole or not at all, and deleting it changes
nothing. Examples that are longer than a row are dropped by who packs them, and have none.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tpu_llm.arrays import Batch
from tpu_llm.data import packing
from tpu_llm.data.cache import appearing_whole, save_array
from tpu_llm.data.documents import Document, Documents
from tpu_llm.data.streams import in_order
from tpu_llm.data.tokenizer import Tokenizer

_ABSENT = (0, 0)


class Referenced(Documents):
    """Examples, ready to be packed, with the column `reference` of `examples.PAIR`."""

    def __init__(self, docs: Documents, folder: Path):
        self._docs, self._folder = docs, folder
        self.fingerprint, self.kind, self.on_bad = docs.fingerprint, docs.kind, docs.on_bad
        self._spans = np.load(folder / 'spans.npy', mmap_mode='r')  # start and stop, int64 [documents, 2]
        values = folder / 'reference.bin'  # NumPy maps no empty file
        self._values = np.memmap(values, np.float32, mode='r') if values.stat().st_size else np.zeros(0, np.float32)

    def __len__(self) -> int:
        return len(self._docs)

    def name(self, index: int) -> str:
        return self._docs.name(index)

    def read(self, index: int) -> Document:
        return self._with_reference(index, self._docs.read(index))

    def __getitem__(self, index: int) -> Document | None:
        document = self._docs[index]
        return None if document is None else self._with_reference(index, document)

    def _with_reference(self, index: int, document: Document) -> Document:
        assert document.pairs is not None
        start, stop = self._spans[index]
        if start == stop:
            return document
        pairs = document.pairs.copy()
        pairs['reference'] = self._values[start:stop]
        return Document(pairs=pairs)

    def __reduce__(self):
        return Referenced, (self._docs, self._folder)


def write(
    docs: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    rows: int,
    seq_len: int,
    score: Callable[[Batch], np.ndarray],
) -> None:
    """Scores every example that fits in a row; `score` gives float32 [rows, T] for a batch of so many rows."""
    every = ((number, document.pairs) for number, document in in_order(docs))
    fitting = ((number, pairs) for number, pairs in every if pairs is not None and len(pairs) <= seq_len)
    spans, end = np.full((len(docs), 2), _ABSENT, np.int64), 0
    with appearing_whole(folder) as part:
        with (part / 'reference.bin').open('wb') as file:
            for batch, placed in packing.passing(fitting, rows, seq_len, tokenizer.pad):
                scores = score(batch)
                for number, pairs, row, columns in placed:
                    file.write(scores[row, columns].astype(np.float32).tobytes())
                    spans[number] = end, end + len(pairs)
                    end += len(pairs)
        save_array(part / 'spans.npy', spans)

"""The ids of a source, tokenized once: `tokens.bin` and `spans.npy` in a folder that appears whole or not at all.

The folder's name is a hash of what the source holds and of the tokenizer, so nothing in it ever goes stale. It is an
optimization: delete it, and the run reads the same batches more slowly.
"""

import contextlib
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from etils import epath

from tpu_llm.data import documents
from tpu_llm.data.documents import Document, Documents, tokens_of
from tpu_llm.data.streams import in_order
from tpu_llm.data.tokenizer import Tokenizer

_CHUNK = 1 << 22  # characters that are tokenized together, on all cores
_LAYOUT = 1  # raise it when the files come to mean something else
_ABSENT = (-1, -1)


class CachedDocuments(Documents):
    """A source whose ids are on disk. Bad records stay absent, so that every index means what it did."""

    def __init__(self, docs: Documents, folder: Path, dtype: np.dtype):
        self._docs, self._folder, self._dtype = docs, folder, dtype
        self.fingerprint = docs.fingerprint
        self._spans = np.load(folder / 'spans.npy', mmap_mode='r')  # start and stop, int64 [documents, 2]
        tokens = folder / 'tokens.bin'  # NumPy maps no empty file
        self._tokens = np.memmap(tokens, dtype, mode='r') if tokens.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        return self._docs.name(index)

    def read(self, index: int) -> Document:
        start, stop = self._spans[index]
        return Document(tokens=self._tokens[start:stop])

    def __getitem__(self, index: int) -> Document | None:
        return None if self._spans[index, 0] < 0 else self.read(index)

    def lengths(self) -> np.ndarray:
        """Ids of each document that is present, int64."""
        return np.diff(self._spans[self._spans[:, 0] >= 0], axis=1)[:, 0]

    def __reduce__(self):
        return CachedDocuments, (self._docs, self._folder, self._dtype)


def cached(docs: Documents, tokenizer: Tokenizer, cache: epath.PathLike) -> CachedDocuments:
    """The source read through its cache, which is written first if it is not there."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    folder = Path(cache) / documents.fingerprint(docs.fingerprint, tokenizer.fingerprint, _LAYOUT)
    if not folder.exists():
        _write(docs, tokenizer, folder, dtype)
    return CachedDocuments(docs, folder, dtype)


def _write(docs: Documents, tokenizer: Tokenizer, folder: Path, dtype: np.dtype) -> None:
    with appearing_whole(folder) as part:
        with (part / 'tokens.bin').open('wb') as file:
            spans = _write_tokens(docs, tokenizer, file, dtype)
        save_array(part / 'spans.npy', spans)


def save_array(path: Path, array: np.ndarray) -> None:
    file = io.BytesIO()  # NumPy's own writing hides why it failed
    np.save(file, array)
    path.write_bytes(file.getvalue())


@contextlib.contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` once all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix='part-'))
    try:
        yield part
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.exists():  # else another process was first, and wrote the same
                raise
    except OSError as error:
        error.filename = error.filename or os.fspath(folder)  # a full disk does not say which
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_tokens(docs: Documents, tokenizer: Tokenizer, file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    spans, end = np.full((len(docs), 2), _ABSENT, np.int64), 0
    for chunk in _chunks(docs):
        texts = iter(tokenizer.encode_batch([d.text for _, d in chunk if d.text is not None]))
        for index, document in chunk:
            if document.text is not None:
                tokens = next(texts)
            else:
                tokens = tokens_of(document, tokenizer, functools.partial(docs.name, index))
            file.write(tokens.astype(dtype).tobytes())
            spans[index] = end, end + len(tokens)
            end += len(tokens)
    return spans


def _chunks(docs: Documents) -> Iterator[list[tuple[int, Document]]]:
    chunk, size = [], 0
    for index, document in in_order(docs):
        chunk.append((index, document))
        size += len(document.text or '')
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

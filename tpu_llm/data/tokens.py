"""Flat files of token ids, as other programs write them: `.npy` or raw `.bin`, documents one after the other."""

import dataclasses
from typing import Literal

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data import documents
from tpu_llm.data.documents import Document, Documents, FileDocuments

_BLOCK = 1 << 22  # ids looked at together for ends of documents


@dataclasses.dataclass(kw_only=True, slots=True)
class Tokens:
    """Documents in which each `end` id closes one; the end id itself gives way to the tokenizer's own mark.

    `dtype` is that of raw `.bin` files, little-endian; `.npy` files tell theirs. No document spans two files.
    """

    paths: tuple[str, ...]
    end: int
    dtype: Literal['uint16', 'uint32', 'int32'] = 'uint16'

    def open(self) -> Documents:
        return _Flat(self.paths, self.end, self.dtype)


class _Flat(FileDocuments):
    tokenized = True

    def __init__(self, paths: tuple[str, ...], end: int, dtype: str):
        super().__init__('tokens', paths, 'stop', end, dtype)
        self._end, self._dtype = end, dtype

    def index(self, file: epath.Path) -> '_Spans':
        return _Spans(file, self._end, self._dtype)

    def record(self, file: epath.Path, index: '_Spans', i: int) -> Document:
        return Document(tokens=index.read(*map(int, index.spans[i])))

    def record_name(self, file: epath.Path, index: '_Spans', i: int) -> str:
        start, stop = map(int, index.spans[i])
        return f'{file}, ids {start} to {stop}'

    def lengths(self) -> np.ndarray:
        return np.concatenate([index.spans[:, 1] - index.spans[:, 0] for index in self.indexes])


class _Spans:
    """Where the documents of one file begin and end, in ids: int64 `[documents, 2]`."""

    def __init__(self, file: epath.Path, end: int, dtype: str):
        self._file = file
        self._dtype, self._first, count = _layout(file, dtype)
        ends = [np.zeros(0, np.int64)]
        for start in range(0, count, _BLOCK):
            ends.append(start + np.flatnonzero(self.read(start, min(start + _BLOCK, count)) == end))
        stops = np.append(np.concatenate(ends), count)
        starts = np.append(0, stops[:-1] + 1)
        self.spans = np.stack([starts, stops], 1)[stops > starts]

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self._dtype.itemsize
        data = documents.read_range(self._file, self._first + start * size, self._first + stop * size)
        return np.frombuffer(data, self._dtype)


def _layout(file: epath.Path, dtype: str) -> tuple[np.dtype, int, int]:
    """The ids' type, the byte where they begin, and how many there are."""
    length = file.stat().length
    if file.suffix != '.npy':
        kind, first = np.dtype(dtype).newbyteorder('<'), 0
        if length % kind.itemsize:
            raise ConfigError(f'{file} has {length} bytes, no whole number of {dtype} ids; set dtype=')
        return kind, first, length // kind.itemsize
    with file.open('rb') as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, kind = read_header(stream)
        except ValueError as error:
            raise ConfigError(f'{file} is not a .npy file: {error}') from None
        first = stream.tell()
    if len(shape) != 1 or kind.kind not in 'iu':
        raise ConfigError(f'{file} holds {kind} of shape {shape}; it must be one row of integer ids')
    return kind, first, shape[0]

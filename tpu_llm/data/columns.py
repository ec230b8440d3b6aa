"""Parquet and ArrayRecord files."""

import dataclasses
import threading
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data import documents
from tpu_llm.data.documents import BadRecord, Document, Documents, FileDocuments, OnBad
from tpu_llm.data.files import text_or_tokens


@dataclasses.dataclass(kw_only=True, slots=True)
class Parquet:
    """A document a row: `column` is text or a list of token ids.

    Parquet is read a row group at a time, so reading rows in shuffled order costs a row group each: give `Data` a
    cache, or write small row groups. Needs the extra `parquet`.
    """

    paths: tuple[str, ...]
    column: str = 'text'
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return _Parquet(self.paths, self.on_bad, self.column)


class _Parquet(FileDocuments):
    def __init__(self, paths: tuple[str, ...], on_bad: OnBad, column: str):
        super().__init__('parquet', paths, on_bad, column)
        self._column = column

    def index(self, file: epath.Path) -> '_Rows':
        return _Rows(file, self._column)

    def record(self, file: epath.Path, index: '_Rows', i: int) -> Document:
        try:
            return text_or_tokens(index.value(i), self._column)
        except ValueError as error:
            raise BadRecord(f'{self.record_name(file, index, i)}: {error}') from None

    def record_name(self, file: epath.Path, index: Any, i: int) -> str:
        return f'{file}, row {i}'


class _Rows:
    """One column of one Parquet file, with the row group that was read last."""

    def __init__(self, file: epath.Path, column: str):
        try:
            from pyarrow import parquet
        except ImportError:
            raise ConfigError("Parquet needs pyarrow: pip install -e '.[parquet]'") from None
        self._file, self._column = file, column
        with file.open('rb') as stream:
            try:
                metadata = parquet.ParquetFile(stream).metadata
            except ValueError as error:  # pyarrow.ArrowInvalid
                raise ConfigError(f'{file} is not a Parquet file: {error}') from None
        names = metadata.schema.to_arrow_schema().names
        if column not in names:
            raise ConfigError(f'{file} has no column {column!r}; it has {", ".join(names)}')
        self._ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
        self._lock, self._held = threading.Lock(), (-1, None)  # threads that read in order share a row group

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def value(self, i: int) -> Any:
        group = int(np.searchsorted(self._ends, i, side='right'))
        first = int(self._ends[group - 1]) if group else 0
        return self._read(group)[i - first].as_py()

    def _read(self, group: int) -> Any:
        from pyarrow import parquet

        with self._lock:
            held, values = self._held
            if held != group:
                with self._file.open('rb') as stream:
                    table = parquet.ParquetFile(stream).read_row_group(group, columns=[self._column])
                values = table.column(0)
                self._held = group, values
            return values

    def __reduce__(self):
        return _Rows, (self._file, self._column)


@dataclasses.dataclass(kw_only=True, slots=True)
class ArrayRecord:
    """A document a record, UTF-8. Its reader knows local files only: mount a bucket to read from it."""

    paths: tuple[str, ...]
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return _ArrayRecord('arrayrecord', self.paths, self.on_bad)


class _ArrayRecord(FileDocuments):
    def index(self, file: epath.Path) -> Any:
        from grain.sources import ArrayRecordDataSource

        if documents.is_remote(file):
            raise ConfigError(f'{file}: ArrayRecord files are read locally; copy them or mount the bucket')
        try:
            return ArrayRecordDataSource(str(file))
        except RuntimeError as error:
            raise ConfigError(f'{file} is not an ArrayRecord file: {error}') from None

    def record(self, file: epath.Path, index: Any, i: int) -> Document:
        try:
            return Document(text=index[i].decode('utf-8'))
        except UnicodeDecodeError as error:
            raise documents.not_utf8(self.record_name(file, index, i), error) from None

    def record_name(self, file: epath.Path, index: Any, i: int) -> str:
        return f'{file}, record {i}'

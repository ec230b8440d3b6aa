"""Text files and JSONL, local or gs://; of files with a document a line only the lines' offsets are in memory."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data import documents
from tpu_llm.data.documents import BadRecord, Document, Documents, FileDocuments, OnBad

_BLOCK = 1 << 24


@dataclasses.dataclass(kw_only=True, slots=True)
class Text:
    """UTF-8 text, every byte kept: a document a file, or a line without its end."""

    paths: tuple[str, ...]
    per: Literal['file', 'line'] = 'file'
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return (_Whole if self.per == 'file' else Lines)('text', self.paths, self.on_bad, self.per)


@dataclasses.dataclass(kw_only=True, slots=True)
class Jsonl:
    """A JSON object a line, whose `field` is text or a list of token ids."""

    paths: tuple[str, ...]
    field: str = 'text'
    on_bad: OnBad = 'stop'

    def open(self) -> Documents:
        return _Jsonl('jsonl', self.paths, self.on_bad, self.field)


class _Whole(FileDocuments):
    def index(self, file: epath.Path) -> range:
        return range(1 if file.stat().length else 0)

    def record(self, file: epath.Path, index: Any, i: int) -> Document:
        data = file.read_bytes()
        try:
            return Document(text=data.decode('utf-8'))
        except UnicodeDecodeError as error:
            line = 1 + data.count(b'\n', 0, error.start)
            raise documents.not_utf8(f'{file}, line {line}', error) from None

    def record_name(self, file: epath.Path, index: Any, i: int) -> str:
        return str(file)


class Lines(FileDocuments):
    """Lines end with a line feed; empty lines are no documents."""

    def index(self, file: epath.Path) -> np.ndarray:
        return line_spans(file)

    def record(self, file: epath.Path, index: np.ndarray, i: int) -> Document:
        data = documents.read_range(file, *map(int, index[i]))
        try:
            return self.parse(data.decode('utf-8'))
        except UnicodeDecodeError as error:
            raise documents.not_utf8(self.record_name(file, index, i), error) from None
        except ConfigError as error:
            raise ConfigError(f'{self.record_name(file, index, i)}: {error}') from None
        except ValueError as error:
            raise BadRecord(f'{self.record_name(file, index, i)}: {error}') from None

    def parse(self, line: str) -> Document:
        """Raises ValueError that says what is wrong with the line; ConfigError where it is not the line's fault."""
        return Document(text=line)

    def record_name(self, file: epath.Path, index: np.ndarray, i: int) -> str:
        return f'{file}, line {line_number(file, int(index[i, 0]))}'


class _Jsonl(Lines):
    def __init__(self, kind: str, paths: tuple[str, ...], on_bad: OnBad, field: str):
        super().__init__(kind, paths, on_bad, field)
        self._field = field

    def parse(self, line: str) -> Document:
        record = parse_json(line)
        if not isinstance(record, dict) or self._field not in record:
            held = f'has {", ".join(map(repr, record))}' if isinstance(record, dict) else 'is no object'
            raise ValueError(f'no field {self._field!r} (the record {held}); set field=')
        return text_or_tokens(record[self._field], self._field)


def parse_json(line: str) -> Any:
    """Raises ValueError that says where it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        array = '; it looks like one JSON array: write an object a line' if line.lstrip().startswith('[') else ''
        raise ValueError(f'not JSON ({error.msg} at character {error.pos + 1}{array})') from None
    except RecursionError:
        raise ValueError('JSON that is nested too deeply') from None


def text_or_tokens(value: Any, field: str) -> Document:
    """A document from a field of a record; raises ValueError where it is neither text nor token ids."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{field!r} holds half of a surrogate pair, which is no text') from None
        return Document(text=value)
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value):
        return Document(tokens=np.asarray(value, np.int32))
    raise ValueError(f'{field!r} is neither text nor a list of token ids')


# ---------------------------------------------------------------------------------------------------- lines


def line_spans(file: epath.Path) -> np.ndarray:
    """Start and stop of every line that is not empty, without its line feed: int64 `[lines, 2]`."""
    feeds = [
        np.zeros(0, np.int64),
        *(offset + np.flatnonzero(block == 10) for offset, block in _blocks(file)),
    ]
    stops = np.append(np.concatenate(feeds), file.stat().length)
    starts = np.append(0, stops[:-1] + 1)
    return np.stack([starts, stops], 1)[stops > starts]


def line_number(file: epath.Path, offset: int) -> int:
    """The line, from 1, on which a byte lies."""
    return 1 + sum(int((block[: max(offset - start, 0)] == 10).sum()) for start, block in _blocks(file))


def _blocks(file: epath.Path) -> Iterator[tuple[int, np.ndarray]]:
    with file.open('rb') as stream:
        offset = 0
        while block := stream.read(_BLOCK):
            yield offset, np.frombuffer(block, np.uint8)
            offset += len(block)

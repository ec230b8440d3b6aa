"""Random access to documents, and the few things every source shares: globs, ranges of files, bad records."""

import abc
import dataclasses
import functools
import glob
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer

OnBad = Literal['stop', 'skip']

_log = logging.getLogger(__name__)


class BadRecord(ConfigError):
    """A record that cannot be read; the one line names its file and line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """Text, or the ids of text that was tokenized before, or an example of post-training; exactly one of them."""

    text: str | None = None
    tokens: np.ndarray | None = None  # any integer dtype, [n], without begin and end marks
    pairs: np.ndarray | None = None  # as `examples` has them
    record: Mapping[str, Any] | None = None  # of a prompt, whose text the policy is to answer: what rewards may ask for


class Documents(abc.ABC):
    """A source, opened: `len(docs)`, `docs[i]`, `docs.name(i)`, from any thread; pickles to a worker process.

    `fingerprint` changes when the content does, and is known without reading large files: the token cache's key.
    """

    fingerprint: str
    on_bad: OnBad = 'stop'
    skips = ''  # the flag that passes over bad records, where it is known
    tokenized = False  # whether it is files of ids already, of which a cache would be a copy
    kind = 'text'  # else what its examples are: 'conversation', 'preference', …

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What a person looks for: the file, and the line or record in it."""

    @abc.abstractmethod
    def read(self, index: int) -> Document:
        """Raises BadRecord."""

    def lengths(self) -> np.ndarray | None:
        """Ids of each document that is present, int64; None where only tokenizing would tell."""
        return None

    def encoded(self, tokenizer: Tokenizer) -> 'Documents':
        """The same, whose documents are examples as `pairs` if it is of such; until then these are their text."""
        del tokenizer
        return self

    def read_first(self) -> None:
        """Raises BadRecord where the first record is one: a file of other records is refused before anything begins."""
        self[0]

    def __getitem__(self, index: int) -> Document | None:
        """The document, or None for a bad record where those are skipped (with a warning in the log)."""
        try:
            return self.read(index)
        except BadRecord as error:
            if self.on_bad == 'stop':
                flag = f': {self.skips}' if self.skips else ''
                raise BadRecord(f"{error} (on_bad='skip' passes over such records{flag})") from None
            say_skipped(str(error))
            return None


_skipped: set[int] = set()


def say_skipped(record: str) -> None:
    """Once for each record, which is met again in every epoch; and how many they are in this process."""
    if hash(record) not in _skipped:
        _skipped.add(hash(record))
        _log.warning('skipped %s (%d so far)', record, len(_skipped))


@runtime_checkable
class Source(Protocol):
    """What a mixture is made of: a config that opens documents."""

    def open(self) -> Documents: ...


class Head(Documents):
    """The first `count` documents of a source."""

    def __init__(self, docs: Documents, count: int):
        self.docs, self.count = docs, min(count, len(docs))
        self.on_bad, self.kind = docs.on_bad, docs.kind
        self.fingerprint = f'{docs.fingerprint}-{self.count}'

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.docs.name(index)

    def read(self, index: int) -> Document:
        return self.docs.read(index)

    def __getitem__(self, index: int) -> Document | None:
        return self.docs[index]

    def encoded(self, tokenizer: Tokenizer) -> Documents:
        return Head(self.docs.encoded(tokenizer), self.count)


class FileDocuments(Documents):
    """Documents of which a file holds many: a subclass indexes one file and reads one record of it.

    Files are indexed on first use, so that a source whose ids are cached is never read.
    """

    def __init__(self, kind: str, paths: Sequence[str], on_bad: OnBad, *options: Any):
        self.files = expand(paths)
        self.on_bad = on_bad
        self.fingerprint = files_fingerprint(self.files, kind, on_bad, *options)

    @abc.abstractmethod
    def index(self, file: epath.Path) -> Sized:
        """What `record` needs to find record i of the file; its length is the number of records."""

    @abc.abstractmethod
    def record(self, file: epath.Path, index: Any, i: int) -> Document: ...

    @abc.abstractmethod
    def record_name(self, file: epath.Path, index: Any, i: int) -> str: ...

    @functools.cached_property
    def indexes(self) -> list[Any]:
        return [self.index(file) for file in self.files]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(index) for index in self.indexes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        return self.record_name(*self._locate(index))

    def read(self, index: int) -> Document:
        return self.record(*self._locate(index))

    def _locate(self, index: int) -> tuple[epath.Path, Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side='right'))
        before = int(self._ends[at - 1]) if at else 0
        return self.files[at], self.indexes[at], index - before


def tokens_of(document: Document, tokenizer: Tokenizer, name: Callable[[], str]) -> np.ndarray:
    """Ids of a document, tokenized now or before. Raises ConfigError on an id that the vocabulary lacks."""
    if document.text is not None:
        return tokenizer.encode(document.text)
    tokens = document.tokens
    assert tokens is not None
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        wrong = int(tokens.max() if tokens.max() >= tokenizer.vocab_size else tokens.min())
        raise ConfigError(
            f'{name()} holds id {wrong}, but the vocabulary has {tokenizer.vocab_size}; '
            'use the tokenizer with which it was made'
        )
    return tokens


def fingerprint(*parts: Any) -> str:
    """Twenty hex digits over JSON-ready values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


# ---------------------------------------------------------------------------------------------------- files


def expand(paths: Sequence[str]) -> list[epath.Path]:
    """The files that the globs name, sorted within each. Raises ConfigError where a pattern names none."""
    if not paths:
        raise ConfigError('paths is empty; name at least one file or glob')
    return [file for pattern in paths for file in _expand(pattern)]


def _expand(pattern: str) -> list[epath.Path]:
    if is_remote(pattern):
        fs, name = _remote(pattern)
        names = [fs.unstrip_protocol(found) for found in fs.glob(name)]
    else:
        names = glob.glob(str(epath.Path(pattern).expanduser()), recursive=True)
    found = [epath.Path(name) for name in sorted(names)]
    files = [path for path in found if not path.is_dir()]
    if found and not files:
        raise ConfigError(f'{pattern!r} is a folder; name its files with a glob, such as {pattern}/*')
    if not files:
        raise ConfigError(f'no file matches {pattern!r}; check the path')
    return files


def _remote(path: epath.PathLike) -> tuple[Any, str]:
    """The file system of a remote path, and the path's name there."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(str(path))
    except ImportError:
        raise ConfigError(f"{path} needs gcsfs: pip install -e '.[gcs]'") from None


def files_fingerprint(files: Iterable[epath.Path], *parts: Any) -> str:
    """Changes when a file's path, size or modification time does."""
    stats = [(str(file), file.stat()) for file in files]
    return fingerprint([(name, stat.length, str(stat.mtime)) for name, stat in stats], *parts)


def read_range(path: epath.Path, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file; one ranged request where the file is remote."""
    if is_remote(path):
        fs, name = _remote(path)
        return fs.cat_file(name, start=start, end=stop)
    with path.open('rb') as file:
        file.seek(start)
        return file.read(stop - start)


def is_remote(path: epath.PathLike) -> bool:
    return '://' in str(path)


def not_utf8(where: str, error: UnicodeDecodeError) -> BadRecord:
    return BadRecord(f'{where}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file')

"""What a teacher held likely in documents, stored once: a folder that students read in place of the teacher.

    about.json       top_k, the sources in the mixture's order, fingerprints of tokenizer, documents and the teacher's
                     weights, and where it was
    0/spans.npy      int64 [documents, 2]: which rows are a document's, of the mixture's first source; 0 0: none
    0/checks.npy     uint32 [documents]: of what the teacher read
    0/likely.bin     int32 [rows, top_k]: at each position of weight above 0 the likeliest tokens, the likeliest first
    0/log_probs.bin  float16 [rows, top_k]: their natural log-probs at temperature 1
    0/rest.bin       float16 [rows]: log of the probability of all others together
    1/…              the second source

Folders are local, since they are read by mapping them into memory.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tpu_llm.arrays import Batch, TaughtBatch
from tpu_llm.config import ConfigError
from tpu_llm.data import packing
from tpu_llm.data.cache import save_array
from tpu_llm.data.documents import Documents
from tpu_llm.data.examples import as_pairs
from tpu_llm.data.forms import Another, Write, put, zeros
from tpu_llm.data.packing import Piece
from tpu_llm.data.streams import Stream
from tpu_llm.data.tokenizer import Tokenizer

# Of a batch: its likeliest tokens int [B, T, X], their log-probs and that of the rest, float [B, T, X] and [B, T].
Teach = Callable[[Batch], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclasses.dataclass(kw_only=True, slots=True)
class Taught:
    """Rows of whole documents with what a teacher held likely, which `train.teaching` stored at `path`."""

    gives: ClassVar = TaughtBatch

    path: str
    weights: str = ''  # the identity of the teacher's, as `checkpoint.pretrained` has it; '': of any teacher

    def about(self) -> dict[str, Any]:
        """Raises ConfigError where nothing is stored."""
        file = Path(self.path) / 'about.json'
        if not file.exists():
            raise ConfigError(
                f'{self.path!r} holds no stored teacher; store one there with configs/distill.py:kind=store'
            )
        return json.loads(file.read_text())

    def check(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """`about`. Raises ConfigError for what another teacher, or one of another tokenizer, said."""
        about = self.about()
        if about['tokenizer'] != tokenizer.fingerprint:
            raise ConfigError(f'{self.path} is of a teacher with another tokenizer; use its own for the student')
        if self.weights not in ('', about.get('weights')):
            raise ConfigError(
                f'{self.path} is of a teacher with other weights ({about["teacher"]} as it was then); store this one, '
                'in another folder'
            )
        return about

    def empty(self, rows: int, length: int) -> TaughtBatch:
        shape = (rows, length, self.about()['top_k'])
        likely, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        rest = np.zeros((rows, length), np.float32)
        return TaughtBatch(likely=likely, likely_log_probs=log_probs, rest=rest, **zeros(rows, length))

    def added(self, tokenizer: Tokenizer) -> int:
        del tokenizer
        return 0

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        about = self.check(tokenizer)
        folders = [Path(self.path) / str(i) for i in range(len(about['sources']))]
        stored = functools.cache(lambda source: _Stored(folders[source], about['top_k']))

        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            del drawing, another
            assert isinstance(batch, TaughtBatch)
            put(batch, row, packing.fill([pieces], 1, length, tokenizer.pad))
            left = 0
            for piece in pieces:
                if piece.source >= len(folders):
                    raise ConfigError(f'{self.path} has no source {piece.source}; store the teacher for this mixture')
                pairs = as_pairs(piece.ids)
                found = stored(piece.source).read(piece.document, pairs)
                at = left + np.flatnonzero(pairs['weight'] > 0)
                batch.likely[row, at], batch.likely_log_probs[row, at], batch.rest[row, at] = found
                left += len(pairs)

        return write


class _Stored:
    """One source's part of the folder."""

    def __init__(self, folder: Path, top_k: int):
        self._folder = folder
        self._spans, self._checks = (np.load(folder / f'{name}.npy', mmap_mode='r') for name in ('spans', 'checks'))
        self._likely = _mapped(folder / 'likely.bin', np.int32, top_k)
        self._log_probs = _mapped(folder / 'log_probs.bin', np.float16, top_k)
        self._rest = _mapped(folder / 'rest.bin', np.float16, 1)[:, 0]

    def read(self, document: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of its positions of weight above 0. Raises ConfigError for what the teacher has not read."""
        if document >= len(self._checks) or self._checks[document] != _check(pairs):
            raise ConfigError(
                f'document {document} is not what the teacher of {self._folder} read; store it again for these sources'
            )
        start, stop = self._spans[document]
        return self._likely[start:stop], self._log_probs[start:stop], self._rest[start:stop]


def _mapped(file: Path, dtype: Any, width: int) -> np.ndarray:
    if not file.stat().st_size:  # NumPy maps no empty file
        return np.zeros((0, width), dtype)
    return np.memmap(file, dtype, mode='r').reshape(-1, width)


def _check(pairs: np.ndarray) -> int:
    return zlib.crc32(np.stack([pairs['token'], pairs['target'], pairs['weight'] > 0]).astype(np.int32).tobytes())


def store(stream: Stream, docs: Documents, folder: Path, rows: int, seq_len: int, pad: int, teach: Teach) -> int:
    """Stores one source's documents, those that fit in a row; returns the number of positions."""
    every = ((number, stream.fitting(number, seq_len, 'drop')) for number in range(len(docs)))
    fitting = ((number, as_pairs(ids)) for number, ids in every if ids is not None)
    spans, checks, end = np.zeros((len(docs), 2), np.int64), np.zeros(len(docs), np.uint32), 0
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / 'likely.bin').open('wb') as likely,
        (folder / 'log_probs.bin').open('wb') as log_probs,
        (folder / 'rest.bin').open('wb') as rest,
    ):
        for batch, placed in packing.passing(fitting, rows, seq_len, pad):
            tokens, logs, others = teach(batch)
            for number, pairs, row, columns in placed:
                at = columns.start + np.flatnonzero(pairs['weight'] > 0)
                likely.write(tokens[row, at].astype(np.int32).tobytes())
                log_probs.write(logs[row, at].astype(np.float16).tobytes())
                rest.write(others[row, at].astype(np.float16).tobytes())
                spans[number], checks[number] = (end, end + len(at)), _check(pairs)
                end += len(at)
    save_array(folder / 'spans.npy', spans)
    save_array(folder / 'checks.npy', checks)
    return end

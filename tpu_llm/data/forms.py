"""What packed rows become: the form of a run's batches, which is plain rows (`arrays.Batch`) unless one is given.

`Texts` and `Tasks` here are for whole examples, the forms of `corrupted` are for text of which something is hidden.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from tpu_llm.arrays import Batch, ScoredBatch, TaskBatch
from tpu_llm.config import ConfigError
from tpu_llm.data import packing
from tpu_llm.data.examples import as_pairs
from tpu_llm.data.packing import Piece
from tpu_llm.data.tokenizer import Tokenizer

# The framed ids of another document of the source that a piece is from.
Another = Callable[[Piece, np.random.Generator], np.ndarray]
Write = Callable[[Batch, int, Sequence[Piece], np.random.Generator, Another], None]
"""Puts the pieces of a row into that row of an empty batch."""


class Form(Protocol):
    gives: ClassVar[Any]  # the type of its batches

    def empty(self, rows: int, length: int) -> Batch:
        """A batch of padding, for rows of so many tokens."""
        ...

    def added(self, tokenizer: Tokenizer) -> int:
        """How many ids above the tokenizer's vocabulary it uses."""
        ...

    def make(self, tokenizer: Tokenizer, length: int) -> Write: ...


def generator(seed: int | str, step: int, row: int) -> np.random.Generator:
    """What a row of a step draws from."""
    return np.random.default_rng([*f'{seed}/corruption'.encode(), step, row])


def fill(
    config: Form,
    write: Write,
    packed: Sequence[Sequence[Piece]],
    length: int,
    generators: Sequence[np.random.Generator],
    another: Another,
) -> Batch:
    batch = config.empty(len(packed), length)
    for row, (pieces, drawing) in enumerate(zip(packed, generators, strict=True)):
        if pieces:
            write(batch, row, pieces, drawing, another)
    return batch


def zeros(rows: int, length: int) -> dict[str, np.ndarray]:
    """The fields of a plain batch of padding."""
    names = ('tokens', 'targets', 'segments', 'positions')
    fields = {name: np.zeros((rows, length), np.int32) for name in names}
    return fields | {'weights': np.zeros((rows, length), np.float32)}


def put(batch: Batch, row: int, packed: Batch) -> None:
    """Puts a plain batch of one row into that row of another batch."""
    for field in dataclasses.fields(packed):
        getattr(batch, field.name)[row] = getattr(packed, field.name)[0]


@dataclasses.dataclass(kw_only=True, slots=True)
class Texts:
    """Whole examples and how their texts were judged: what preferences, rewards and rankings are learned from."""

    gives: ClassVar = ScoredBatch

    most: int = 16  # texts in a row; a row ends before it would hold more

    def validate(self) -> None:
        if self.most < 1:
            raise ConfigError(f'most is {self.most}; a row holds at least 1 text, of preferences 2')

    def empty(self, rows: int, length: int) -> ScoredBatch:
        values, marks, reference = (np.zeros((rows, length), np.float32) for _ in range(3))
        examples = np.zeros((rows, length), np.int32)
        return ScoredBatch(values=values, marks=marks, examples=examples, reference=reference, **zeros(rows, length))

    def added(self, tokenizer: Tokenizer) -> int:
        del tokenizer
        return 0

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            del drawing, another
            assert isinstance(batch, ScoredBatch)
            put(batch, row, packing.fill([pieces], 1, length, tokenizer.pad))
            left = 0
            for example, piece in enumerate(pieces, 1):
                pairs = as_pairs(piece.ids)
                here = slice(left, left + len(pairs))
                batch.examples[row, here] = example
                batch.values[row, here], batch.marks[row, here] = pairs['value'], pairs['mark']
                batch.reference[row, here] = pairs['reference']
                left = here.stop

        return write


@dataclasses.dataclass(kw_only=True, slots=True)
class Tasks:
    """One whole document a row, and which of the mixture's sources it is from: its task."""

    gives: ClassVar = TaskBatch
    most: ClassVar = 1  # texts in a row

    def empty(self, rows: int, length: int) -> TaskBatch:
        return TaskBatch(tasks=np.zeros(rows, np.int32), **zeros(rows, length))

    def added(self, tokenizer: Tokenizer) -> int:
        del tokenizer
        return 0

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            del drawing, another
            assert isinstance(batch, TaskBatch)
            put(batch, row, packing.fill([pieces], 1, length, tokenizer.pad))
            batch.tasks[row] = pieces[0].source

        return write

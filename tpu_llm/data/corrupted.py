"""Forms of corrupted text, for the models that learn to restore it.

What is drawn for a row depends on the run's seed, the step and the row's place in the global batch, so the global batch
of a step is still a function of seed, mixture and step. Ids that the tokenizer lacks (mask, sentinels, modes) are those
above its vocabulary, in that order; the model's vocabulary must hold them.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tpu_llm.arrays import Batch, MaskedBatch, PrefixBatch, SourceBatch
from tpu_llm.config import ConfigError
from tpu_llm.data import corruption, packing
from tpu_llm.data.forms import Another, Write, put, zeros
from tpu_llm.data.packing import Piece
from tpu_llm.data.tokenizer import Tokenizer


def _check_rate(rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise ConfigError(f'rate is {rate}; write the share of hidden tokens, above 0 and below 1')


# ---------------------------------------------------------------------------------------------------------- tokens


@dataclasses.dataclass(kw_only=True, slots=True)
class Masks:
    """BERT's: some tokens are hidden, and are the targets.

    With `pairs` a row is one pair of texts, `bos first eos second eos`, cut out of the row's longest piece; of half of
    the pairs the second is of another document. Whatever else the row holds is left out.
    """

    gives: ClassVar = MaskedBatch

    rate: float = 0.15
    whole_words: bool = False  # a word is hidden whole or not at all
    pairs: bool = False

    def validate(self) -> None:
        _check_rate(self.rate)

    def empty(self, rows: int, length: int) -> MaskedBatch:
        types = np.zeros((rows, length), np.int32)
        return MaskedBatch(token_types=types, unrelated=np.zeros(rows, np.int32), **zeros(rows, length))

    def added(self, tokenizer: Tokenizer) -> int:
        return int(self._mask(tokenizer) == tokenizer.vocab_size)

    def _mask(self, tokenizer: Tokenizer) -> int:
        marks = tokenizer.special_tokens
        return marks.get('[MASK]', marks.get('<mask>', tokenizer.vocab_size))

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        if self.pairs and length < 5:
            raise ConfigError(f'seq_len is {length}; two texts and their marks need at least 5')
        begins = corruption.WordStarts(tokenizer) if self.whole_words else None
        marks = np.array(sorted({tokenizer.bos, tokenizer.eos, tokenizer.pad}))
        mask = self._mask(tokenizer)

        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            assert isinstance(batch, MaskedBatch)
            if self.pairs:
                _pair(batch, row, max(pieces, key=lambda piece: piece.stop - piece.start), drawing, another, tokenizer)
            else:
                put(batch, row, packing.fill([pieces], 1, length, tokenizer.pad))
            tokens, segments = np.asarray(batch.tokens[row]), np.asarray(batch.segments[row])
            fixed = np.isin(tokens, marks) | (segments == 0)
            starts = np.ones(length, bool) if begins is None else begins(tokens)
            starts |= fixed | np.roll(fixed, 1) | (segments != np.roll(segments, 1))
            words = np.where(fixed, corruption.NEVER, np.cumsum(starts))
            batch.targets[row] = np.where(segments > 0, tokens, 0)
            batch.tokens[row], chosen = corruption.mask_tokens(
                tokens, words, drawing, rate=self.rate, mask=mask, vocab_size=tokenizer.vocab_size
            )
            batch.weights[row] = chosen

        return write


def _pair(
    batch: MaskedBatch,
    row: int,
    piece: Piece,
    drawing: np.random.Generator,
    another: Another,
    tokenizer: Tokenizer,
) -> None:
    """`bos first eos second eos` (Devlin et al., 2018, section 3.1); a piece of less than 2 tokens gives none."""
    length = batch.tokens.shape[1]
    text = _text(piece, tokenizer)[: length - 3]
    if len(text) < 2:
        return
    cut = 1 + int(drawing.integers(len(text) - 1))
    first, second = text[:cut], text[cut:]
    if drawing.random() < 0.5:
        other = another(piece, drawing)[1:-1]
        start = int(drawing.integers(max(len(other) - len(second), 0) + 1))
        second = other[start : start + len(second)]
        batch.unrelated[row] = 1
    used = len(first) + len(second) + 3
    batch.tokens[row] = tokenizer.pad
    batch.tokens[row, :used] = np.concatenate([[tokenizer.bos], first, [tokenizer.eos], second, [tokenizer.eos]])
    batch.segments[row, :used] = 1
    batch.positions[row, :used] = np.arange(used)
    batch.token_types[row, len(first) + 2 : used] = 1


def _text(piece: Piece, tokenizer: Tokenizer) -> np.ndarray:
    """What a piece adds to its document: its targets, without the end mark. Over all rows every token is in one."""
    text = piece.ids[piece.start + 1 : piece.stop + 1]
    return text[:-1] if piece.stop == len(piece.ids) - 1 and text[-1] == tokenizer.eos else text


# ---------------------------------------------------------------------------------------------------------- spans


@dataclasses.dataclass(kw_only=True, slots=True)
class _Spanned(abc.ABC):
    """Sources and targets for an encoder-decoder, each piece of a row a segment of its own.

    A source ends in `eos` where its document does, a target always. Pieces of a single token, and those whose source or
    target finds no more room, are left out.
    """

    gives: ClassVar = SourceBatch

    target_len: int  # positions of a row of targets
    sentinels: int = 100  # how many ids stand for hidden spans
    start_token: int = 0  # what targets start with: the model's `start_token`

    def validate(self) -> None:
        if self.target_len < 3 or self.sentinels < 1:
            raise ConfigError(
                f'target_len = {self.target_len} must be at least 3 (a sentinel, a token, the end mark) and '
                f'sentinels = {self.sentinels} at least 1'
            )

    @abc.abstractmethod
    def denoisers(self) -> tuple[corruption.Denoiser, ...]:
        """The ways to hide spans, one of which each piece of a row is given."""

    @abc.abstractmethod
    def modes(self, tokenizer: Tokenizer) -> list[int]:
        """What a source begins with, by the denoiser's mode; empty for nothing."""

    def empty(self, rows: int, length: int) -> SourceBatch:
        source, segments = (np.zeros((rows, length), np.int32) for _ in range(2))
        return SourceBatch(source=source, source_segments=segments, **zeros(rows, self.target_len))

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The sentinels, first to last."""
        marks = tokenizer.special_tokens
        names = [f'<extra_id_{i}>' for i in range(self.sentinels)]
        return [marks.get(name, tokenizer.vocab_size + i) for i, name in enumerate(names)]

    def added(self, tokenizer: Tokenizer) -> int:
        return max([*self.ids(tokenizer), *self.modes(tokenizer)]) + 1 - tokenizer.vocab_size

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        denoisers, modes, sentinels = self.denoisers(), self.modes(tokenizer), self.ids(tokenizer)
        needed = max(corruption.most_spans(length, d.rate, d.mean or length) for d in denoisers)
        if needed > self.sentinels:
            raise ConfigError(
                f'form.sentinels = {self.sentinels} are fewer than the {needed} spans that rows of {length} '
                'tokens may have; raise it'
            )

        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            del another
            assert isinstance(batch, SourceBatch)
            batch.source[row], batch.tokens[row] = tokenizer.pad, tokenizer.pad
            read = written = segment = 0
            for piece in pieces:
                text = _text(piece, tokenizer)
                if len(text) < 2:
                    continue
                denoiser = denoisers[int(drawing.integers(len(denoisers)))]
                source, target = denoiser.hide(text, sentinels, drawing)
                ends = [tokenizer.eos] if len(text) < piece.stop - piece.start else []
                source = np.concatenate([modes[denoiser.mode : denoiser.mode + 1], source, ends]).astype(np.int32)
                target = np.append(target, tokenizer.eos)
                from_, to = slice(read, read + len(source)), slice(written, written + len(target))
                if from_.stop > length or to.stop > self.target_len:
                    continue
                segment += 1
                batch.source[row, from_], batch.source_segments[row, from_] = source, segment
                batch.tokens[row, to] = [self.start_token, *target[:-1]]
                batch.targets[row, to], batch.segments[row, to] = target, segment
                batch.positions[row, to], batch.weights[row, to] = np.arange(len(target)), 1.0
                read, written = from_.stop, to.stop

        return write


@dataclasses.dataclass(kw_only=True, slots=True)
class Spans(_Spanned):
    """T5's span corruption."""

    rate: float = 0.15
    mean: float = 3.0  # tokens of a hidden span

    def validate(self) -> None:
        _Spanned.validate(self)
        _check_rate(self.rate)
        if self.mean < 1:
            raise ConfigError(f'mean is {self.mean}; a hidden span has at least 1 token')

    def denoisers(self) -> tuple[corruption.Denoiser, ...]:
        return (corruption.Denoiser(self.rate, self.mean),)

    def modes(self, tokenizer: Tokenizer) -> list[int]:
        return []


@dataclasses.dataclass(kw_only=True, slots=True)
class UL2(_Spanned):
    """UL2's mixture: one of seven denoisers a text, equally likely; its mode token stands before the source."""

    def denoisers(self) -> tuple[corruption.Denoiser, ...]:
        return corruption.UL2

    def modes(self, tokenizer: Tokenizer) -> list[int]:
        above = max(tokenizer.vocab_size, max(self.ids(tokenizer)) + 1)
        return [tokenizer.special_tokens.get(name, above + i) for i, name in enumerate(corruption.MODES)]


# --------------------------------------------------------------------------------------------------------- prefixes


@dataclasses.dataclass(kw_only=True, slots=True)
class Prefix:
    """A random beginning of each piece is given, and seen whole; what follows is predicted, token by token."""

    gives: ClassVar = PrefixBatch

    def empty(self, rows: int, length: int) -> PrefixBatch:
        return PrefixBatch(prefix=np.zeros((rows, length), bool), **zeros(rows, length))

    def added(self, tokenizer: Tokenizer) -> int:
        del tokenizer
        return 0

    def make(self, tokenizer: Tokenizer, length: int) -> Write:
        def write(
            batch: Batch, row: int, pieces: Sequence[Piece], drawing: np.random.Generator, another: Another
        ) -> None:
            del another
            assert isinstance(batch, PrefixBatch)
            put(batch, row, packing.fill([pieces], 1, length, tokenizer.pad))
            left = 0
            for piece in pieces:
                size = piece.stop - piece.start
                given = corruption.prefix_length(size, drawing)
                batch.prefix[row, left : left + given] = True
                # The last given token's target is the first that is not.
                batch.weights[row, left : left + max(given - 1, 0)] = 0.0
                left += size

        return write

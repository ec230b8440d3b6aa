"""Text to ids and back, byte for byte: SentencePiece BPE, its training, and plain bytes.

`decode(encode(text)) == text` for every string, with the models trained here. SentencePiece's defaults lose
bytes; what it takes to lose none:

- identity normalization, no dummy prefix, no removal of white space, and byte fallback for what has no piece;
- U+2581, which SentencePiece writes for a space, is cut out of the text before it sees it and encoded as its
  three bytes;
- decoding joins the bytes of the ids, so the bytes of a sequence are those of its parts, one after the other.
"""

import abc
import dataclasses
import hashlib
import io
import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath

from tpu_llm.config import ConfigError

_SPACE = '\u2581'
_IDS = np.int32


class Tokenizer(abc.ABC):
    """Ids are int32; `bos` and `eos` frame a document, `pad` fills rows that hold none."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone, int32 `[n]`: no begin or end mark is added."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; marks stand for none."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def files(self) -> dict[str, bytes]:
        """What a checkpoint must hold to have this tokenizer again, by path in its folder."""
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 (a model may emit half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


class SentencePiece(Tokenizer):
    """A SentencePiece model. Exact if the model was trained here; a foreign one is taken as it is."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        self.pad = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:20]
        self._bytes = [self._piece_bytes(index) for index in range(self.vocab_size)]
        self._exact = self._keeps_bytes()

    def _keeps_bytes(self) -> bool:
        """False for models with a normalizer or a dummy prefix: they decode by their own rules only."""
        text = ' \u00b2\ufb01  x\n '
        return b''.join(self._bytes[index] for index in self._processor.encode(text)) == text.encode()

    def _piece_bytes(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b''
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:-1], 16)])  # '<0x0A>'
        return piece.replace(_SPACE, ' ').encode()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Many texts at once, on SentencePiece's own threads."""
        if not self._exact or not any(_SPACE in text for text in texts):
            return [np.asarray(ids, _IDS) for ids in self._processor.encode(list(texts))]
        parts = [text.split(_SPACE) for text in texts]
        ids = iter(self._processor.encode(list(itertools.chain.from_iterable(parts))))
        space = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode()]
        return [_join([next(ids) for _ in part], space) for part in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._exact:
            return b''.join([self._bytes[index] for index in ids])
        return self._processor.decode([int(index) for index in ids]).encode()

    def files(self) -> dict[str, bytes]:
        return {'tokenizer/tokenizer.model': self.model}

    def save(self, path: epath.PathLike) -> None:
        publish(epath.Path(path), self.model)

    def __reduce__(self):
        return SentencePiece, (self.model,)


def _join(parts: list[list[int]], between: list[int]) -> np.ndarray:
    joined = list(parts[0])
    for part in parts[1:]:
        joined += between + part
    return np.asarray(joined, _IDS)


class ByteTokenizer(Tokenizer):
    """Ids 0, 1, 2 are pad, bos and eos; byte b is id b + 3."""

    vocab_size, pad, bos, eos, fingerprint = 259, 0, 1, 2, 'bytes'

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(_IDS) + 3

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(index - 3 for index in ids if index >= 3)


class IdsOnly(Tokenizer):
    """The marks of a vocabulary whose text is not at hand."""

    def __init__(self, vocab_size: int, bos: int, eos: int):
        self.vocab_size, self.bos, self.eos, self.pad = vocab_size, bos, eos, 0
        self.fingerprint = f'ids-{vocab_size}-{bos}-{eos}'

    def encode(self, text: str) -> np.ndarray:
        raise ConfigError('a tokenizer of ids only cannot read text; give the .model file as Pretrained(path=…)')

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise ConfigError('a tokenizer of ids only cannot write text; give the .model file as Pretrained(path=…)')


def load(path: epath.PathLike) -> SentencePiece:
    """Reads a `.model` file, local or gs://. Raises ConfigError."""
    path = epath.Path(path)
    if not path.exists():
        raise ConfigError(f'there is no tokenizer {path}; give the path of a SentencePiece .model file')
    try:
        tokenizer = SentencePiece(path.read_bytes())
    except RuntimeError:
        raise ConfigError(f'{path} is not a SentencePiece model') from None
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise ConfigError(f'{path} has no begin or no end mark (bos, eos), which documents are framed by')
    return tokenizer


def publish(path: epath.Path, data: bytes) -> None:
    """Writes a file so that it is seen whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f'{path.name}.{uuid.uuid4().hex}.part'
    part.write_bytes(data)
    part.replace(path)


# -------------------------------------------------------------------------------------------------- configs


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainedBPE:
    """Byte-pair encoding trained on the run's own text, kept in `workdir/tokenizer/`."""

    vocab_size: int
    sample_bytes: int = 20_000_000  # of the run's text; training takes about a second for 10 MB

    def validate(self) -> None:
        if self.vocab_size < 300:
            raise ConfigError(f'vocab_size is {self.vocab_size}; 256 bytes and 4 marks need at least 300')

    def make(self, texts: Iterable[str], workdir: epath.PathLike) -> Tokenizer:
        """The tokenizer of this workdir, trained first if there is none."""
        path = epath.Path(workdir) / 'tokenizer' / 'tokenizer.model'
        if not path.exists():
            SentencePiece(train_bpe(sample(texts, self.sample_bytes), self.vocab_size)).save(path)
        tokenizer = load(path)
        if tokenizer.vocab_size != self.vocab_size:
            raise ConfigError(
                f'{path} has {tokenizer.vocab_size} pieces, the config asks for {self.vocab_size}; '
                'use a new workdir, or delete the file to train it again'
            )
        return tokenizer


@dataclasses.dataclass(kw_only=True, slots=True)
class Pretrained:
    """A SentencePiece `.model` file, local or gs://."""

    path: str

    def make(self, texts: Iterable[str], workdir: epath.PathLike) -> Tokenizer:
        del texts, workdir
        return load(self.path)


@dataclasses.dataclass(kw_only=True, slots=True)
class Bytes:
    """One id a byte."""

    def make(self, texts: Iterable[str], workdir: epath.PathLike) -> Tokenizer:
        del texts, workdir
        return ByteTokenizer()


@dataclasses.dataclass(kw_only=True, slots=True)
class Ids:
    """No text at all: what training on tokenized files needs to know of the tokenizer that made them."""

    vocab_size: int
    bos: int
    eos: int

    def validate(self) -> None:
        for name in ('bos', 'eos'):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f'{name} is {getattr(self, name)}; ids go from 0 to {self.vocab_size - 1}')

    def make(self, texts: Iterable[str], workdir: epath.PathLike) -> Tokenizer:
        del texts, workdir
        return IdsOnly(self.vocab_size, self.bos, self.eos)


# ------------------------------------------------------------------------------------------------- training


def sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Whole documents until `limit` bytes are reached."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model; equal texts give equal bytes. Raises ConfigError where the text is too little."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=1.0,
            # Bytes a token on held-out text of the standard library, at 4,096 and 8,192 pieces:
            # 2.39          SentencePiece's own choices
            # 3.54   3.92   pieces of white space only (indentation)
            # 3.82   4.42   … and pieces across scripts ('self.', '(x)')
            # 3.85   4.45   … of up to 32 characters
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentencepiece_length=32,
            max_sentence_length=4 * _SENTENCE,  # in bytes
            num_threads=4,  # the model records the number, so one for all machines
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition('] ')[2].strip() or 'there is no text to learn from'
        raise ConfigError(f'cannot train {vocab_size} pieces: {reason}') from None
    return model.getvalue()


_SENTENCE = 4000  # characters the trainer takes at once; cut at ends of lines, so that pieces may cross those


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        buffer = ''
        for line in text.splitlines(keepends=True):
            if buffer and len(buffer) + len(line) > _SENTENCE:
                yield buffer
                buffer = ''
            buffer += line[:_SENTENCE]  # of a longer line the beginning serves as well
        if buffer:
            yield buffer

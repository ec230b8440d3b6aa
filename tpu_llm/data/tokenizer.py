"""Text to ids and back: what a tokenizer is, SentencePiece, and plain bytes.

`decode(encode(text)) == text` for every string, with the models trained here (by `bpe`; for foreign ones
see `tokenizer_json` and `tokenizer_gguf`). SentencePiece's defaults lose bytes; what it takes to lose none:

- identity normalization, no dummy prefix, no removal of white space, and byte fallback for what has no piece;
- U+2581, which SentencePiece writes for a space, is cut out of the text before it sees it and encoded as its
  three bytes;
- decoding joins the bytes of the ids, so the bytes of a sequence are those of its parts, one after the other.
"""

import abc
import codecs
import dataclasses
import functools
import hashlib
import importlib
import itertools
import re
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data import marks
from tpu_llm.data.bpe import sample, train_bpe

SPACE = '\u2581'
_IDS = np.int32


class Tokenizer(abc.ABC):
    """Ids are int32; `bos` and `eos` frame a document, `pad` fills rows that hold none.

    `special_tokens` are the marks by how they are written. Text never becomes a mark unless it is asked for
    (`encode(…, special=True)`), so what a stranger writes cannot end a turn or begin another.
    """

    vocab_size: int
    bos: int
    eos: int
    pad: int
    fingerprint: str
    add_bos: bool = True  # a prompt begins with `bos`
    chat_template: str | None = None
    special_tokens: Mapping[str, int] = types.MappingProxyType({})

    @functools.cached_property
    def stops(self) -> frozenset[int]:
        """Ids that end generation."""
        return frozenset((self.eos,))

    def with_chat(self, template: str, end: int) -> 'Tokenizer':
        """The same, with that chat template, and another id that ends generation. Raises ConfigError."""
        raise ConfigError(f'a {type(self).__name__} takes no chat template; use one with special tokens')

    @abc.abstractmethod
    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Ids of the text alone, int32 `[n]`: no begin or end mark is added.

        `special`: what is written like a special token is that token. Raises ValueError for a lone surrogate.
        """

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; marks stand for none."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids with special tokens, and the index in `text` of the character in which each begins; both `[n]`.

        Raises ConfigError where the ids do not stand for the text byte for byte.
        """
        ids = self.encode(text, special=True)
        written = {index: name.encode() for name, index in self.special_tokens.items()}
        pieces = [written.get(index) or self.decode_bytes([index]) for index in ids.tolist()]
        if b''.join(pieces) != text.encode():
            raise ConfigError('this tokenizer changes the text, so its tokens have no place in it')
        return ids, _characters(text, np.cumsum([0, *map(len, pieces)])[:-1])

    def files(self) -> dict[str, bytes]:
        """What a checkpoint must hold to have this tokenizer again, by path in its folder."""
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 (a model may emit half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def stream(self) -> 'Stream':
        """Decodes ids that come one at a time."""
        return Stream(self)


class Stream:
    """What `add` has returned so far and `end` returns at last make up the text of the ids, in whole characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode_bytes = tokenizer.decode_bytes
        self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        # How an id is written may depend on the one before it (a text's first space is dropped, words are joined by
        # one); on more than the last that can be seen it does not.
        self._before: list[int] = []

    def add(self, index: int) -> str:
        """The characters that this id completes."""
        before = self._decode_bytes(self._before)
        added = self._decode_bytes([*self._before, index])[len(before) :]
        if self._decode_bytes([index]):
            self._before = [index]
        elif not before:
            self._before.append(index)
        return self._utf8.decode(added)

    def end(self) -> str:
        """What is left: U+FFFD for half a character, else nothing."""
        return self._utf8.decode(b'', final=True)


def _characters(text: str, starts: np.ndarray) -> np.ndarray:
    """The characters to which the bytes at `starts` belong."""
    ends = np.cumsum([len(character.encode()) for character in text])
    return np.searchsorted(ends, starts, side='right')


def check_text(text: str) -> None:
    """Raises ValueError for text that UTF-8 cannot hold, which tokenizers refuse in words of their own."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, half of a '
            "character; read it as UTF-8 with errors='replace'"
        ) from None


class SentencePiece(Tokenizer):
    """A SentencePiece model. Exact if the model was trained here; a foreign one is taken as it is.

    `files` are those beside a foreign model that say more of its marks (see `marks`).
    """

    def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
        self.model = model
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        own = marks.Marks(bos=processor.bos_id(), eos=processor.eos_id(), pad=max(processor.pad_id(), 0))
        found = marks.read(files, self._id_of, self.vocab_size, own) if files else own
        self._files = marks.kept(files, found) if files else {}
        self.bos, self.eos, self.pad = found.bos, found.eos, found.pad
        self.stops, self.chat_template = found.all_stops, found.chat_template
        self.add_bos = found.add_bos is not False
        self.fingerprint = hashlib.sha256(model + marks.framing(found, own)).hexdigest()[:20]
        self.special_tokens = {
            processor.id_to_piece(index): index for index in range(self.vocab_size) if processor.is_control(index)
        }
        self._special = re.compile('|'.join(map(re.escape, sorted(self.special_tokens, reverse=True))) or '(?!)')
        self._bytes = [self._piece_bytes(index) for index in range(self.vocab_size)]
        self._exact = self._keeps_bytes()
        if not self._exact:
            self._bytes[processor.unk_id()] = processor.decode([processor.unk_id()]).encode()
        # Of two spaces at its beginning, how many a text loses when it is decoded; two stand for all.
        self.spaces_lost = 2 - processor.decode_pieces([SPACE, SPACE, 'x']).count(' ')

    def _keeps_bytes(self) -> bool:
        """False for models with a normalizer or a dummy prefix: they decode by their own rules only."""
        text = ' \u00b2\ufb01  x\n '
        return b''.join(self._bytes[index] for index in self._processor.encode(text)) == text.encode()

    def _id_of(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def _piece_bytes(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b''
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:-1], 16)])  # '<0x0A>'
        return piece.replace(SPACE, ' ').encode()

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        if not special:
            return self.encode_batch([text])[0]
        parts = [np.asarray([part], _IDS) if isinstance(part, int) else self.encode(part) for part in self._parts(text)]
        return np.concatenate([np.zeros(0, _IDS), *parts])

    def _parts(self, text: str) -> Iterator[str | int]:
        """Special tokens, and the text between them."""
        end = 0
        for match in self._special.finditer(text):
            yield text[end : match.start()]
            yield self.special_tokens[match[0]]
            end = match.end()
        yield text[end:]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Many texts at once, on SentencePiece's own threads."""
        for text in texts:
            check_text(text)
        if not self._exact or not any(SPACE in text for text in texts):
            return [np.asarray(ids, _IDS) for ids in self._processor.encode(list(texts))]
        parts = [text.split(SPACE) for text in texts]
        ids = iter(self._processor.encode(list(itertools.chain.from_iterable(parts))))
        space = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
        return [_join([next(ids) for _ in part], space) for part in parts]

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if self._exact:
            return super().locate(text)
        ids, starts, at = [], [], 0
        for part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
                starts.append(at)
                at += len(self._processor.id_to_piece(part).encode())
            else:
                pieces = self._processor.encode(part, return_type='proto').pieces
                ids += [piece.id for piece in pieces]
                starts += [at + piece.begin for piece in pieces]
                at += len(part.encode())
        return np.asarray(ids, _IDS), _characters(text, np.asarray(starts, np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(index) for index in ids]
        return super().decode(ids) if self._exact else self._processor.decode(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        joined = b''.join([self._bytes[index] for index in ids])
        if self._exact or not self.spaces_lost:
            return joined
        return joined.removeprefix(b' ') if self.spaces_lost == 1 else joined.lstrip(b' ')

    def files(self) -> dict[str, bytes]:
        return {f'tokenizer/{name}': data for name, data in {'tokenizer.model': self.model, **self._files}.items()}

    def with_chat(self, template: str, end: int) -> 'SentencePiece':
        return SentencePiece(self.model, marks.with_chat(self, self._files, template, end))

    def save(self, path: epath.PathLike) -> None:
        publish(epath.Path(path), self.model)

    def __reduce__(self):
        return SentencePiece, (self.model, self._files)


def proto() -> Any:
    """The parts of a SentencePiece model, as its package declares them."""
    return importlib.import_module('sentencepiece.sentencepiece_model_pb2')


def _join(parts: list[list[int]], between: list[int]) -> np.ndarray:
    joined = list(parts[0])
    for part in parts[1:]:
        joined += between + part
    return np.asarray(joined, _IDS)


class ByteTokenizer(Tokenizer):
    """Ids 0, 1, 2 are pad, bos and eos; byte b is id b + 3."""

    vocab_size, pad, bos, eos, fingerprint = 259, 0, 1, 2, 'bytes'

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        check_text(text)
        return np.frombuffer(text.encode(), np.uint8).astype(_IDS) + 3

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(index - 3 for index in ids if index >= 3)


class IdsOnly(Tokenizer):
    """The marks of a vocabulary whose text is not at hand."""

    def __init__(self, vocab_size: int, bos: int, eos: int):
        self.vocab_size, self.bos, self.eos, self.pad = vocab_size, bos, eos, 0
        self.fingerprint = f'ids-{vocab_size}-{bos}-{eos}'

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        raise ConfigError('a tokenizer of ids only cannot read text; give its file as Pretrained(path=…)')

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise ConfigError('a tokenizer of ids only cannot write text; give its file as Pretrained(path=…)')


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a SentencePiece `.model` file, a Hugging Face `tokenizer.json` or its folder; local or gs://.

    Raises ConfigError.
    """
    path = epath.Path(path)
    if path.suffix == '.json' or path.is_dir():
        from tpu_llm.data import tokenizer_json

        return tokenizer_json.load(path)
    if not path.exists():
        raise ConfigError(
            f'there is no tokenizer {path}; give a SentencePiece .model file, a tokenizer.json or the folder of one'
        )
    return sentence_piece(path.read_bytes(), path)


def sentence_piece(model: bytes, where: epath.PathLike, files: Mapping[str, bytes] | None = None) -> SentencePiece:
    """The tokenizer of a model's bytes. Raises ConfigError, which says `where` they are from."""
    try:
        tokenizer = SentencePiece(model, files)
    except RuntimeError:
        raise ConfigError(f'{where} is not a SentencePiece model') from None
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise ConfigError(f'{where} has no begin or no end mark (bos, eos), which documents are framed by')
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
        """The tokenizer of this workdir, trained first if there is none. Raises ConfigError for too little text."""
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
    """A SentencePiece `.model` file, a Hugging Face folder or its tokenizer.json, local or gs://."""

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

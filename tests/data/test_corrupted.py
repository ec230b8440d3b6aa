"""Batches of corrupted text, as a loader gives them: what is in them, and that nothing but the step decides."""

import contextlib
import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from tpu_llm.arrays import MaskedBatch, PrefixBatch, SourceBatch
from tpu_llm.config import ConfigError, validate
from tpu_llm.data import forms
from tpu_llm.data.corrupted import UL2, Masks, Prefix, Spans
from tpu_llm.data.evaluation import held_out_rows
from tpu_llm.data.loader import Data, Loader, open_documents
from tpu_llm.data.mixture import Mixture
from tpu_llm.data.packing import Piece
from tpu_llm.data.sources import Text
from tpu_llm.data.tokenizer import Bytes, ByteTokenizer, Ids

TOKENIZER = ByteTokenizer()
BOS, EOS, MASK = TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.vocab_size


def make_data(text, corruption, **changes):
    source = Text(paths=(f'{text}/*.txt',), per='line')
    fields = {'global_batch': 4, 'seq_len': 64, 'interleave': 2, 'form': corruption}
    return Data(mixture=Mixture(sources={'text': source}), tokenizer=Bytes(), **(fields | changes))


def batches(data, count, owned=None, table=None):
    docs = open_documents(data, TOKENIZER, '')
    with contextlib.closing(Loader(data, docs, TOKENIZER, seed=3, owned=owned)) as loader:
        if table is not None:
            loader.restore(table)
        return [next(loader) for _ in range(count)]


def same(one, other, rows=slice(None)):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name)[rows], getattr(other, field.name), err_msg=field.name)


KINDS = {
    'masks': Masks(),
    'whole words': Masks(whole_words=True),
    'pairs': Masks(pairs=True),
    'spans': Spans(target_len=40),
    'ul2': UL2(target_len=80),
    'prefix': Prefix(),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_depends_on_seed_and_step_alone(text, kind):
    """Not on hosts, nor on where the run was stopped."""
    data = make_data(text, KINDS[kind])
    whole = batches(data, 4)
    for batch, _ in whole:
        assert type(batch) is KINDS[kind].gives
    for owned in ([0, 2], [1, 3]):
        for (batch, _), (part, _) in zip(whole, batches(data, 4, owned), strict=True):
            same(batch, part, owned)
    again = batches(data, 2, table=whole[1][1])
    for (batch, _), (later, _) in zip(whole[2:], again, strict=True):
        same(batch, later)
    drawn = [np.asarray(batch.weights).tobytes() for batch, _ in whole]
    assert len(set(drawn)) == len(drawn)  # other steps, other draws


def test_workers_give_the_same_batches(text):
    data = make_data(text, Masks(whole_words=True, pairs=True))
    for (one, _), (other, _) in zip(batches(data, 2), batches(dataclasses.replace(data, workers=2), 2), strict=True):
        same(one, other)


def test_masks_hide_and_ask_for_what_the_rate_says(text):
    plain = batches(make_data(text, None), 3)
    for (packed, _), (batch, _) in zip(plain, batches(make_data(text, Masks()), 3), strict=True):
        assert isinstance(batch, MaskedBatch)
        chosen = batch.weights == 1
        np.testing.assert_array_equal(batch.targets, packed.tokens)
        np.testing.assert_array_equal(batch.tokens[~chosen], packed.tokens[~chosen])
        np.testing.assert_array_equal(batch.segments, packed.segments)
        text_tokens = ~np.isin(packed.tokens, [BOS, EOS, TOKENIZER.pad])
        assert not (chosen & ~text_tokens).any()
        np.testing.assert_array_equal(chosen.sum(1), np.round(0.15 * text_tokens.sum(1)))
        assert (batch.tokens[chosen] == MASK).mean() > 0.5


def test_a_pair_is_two_texts_with_their_marks(text):
    related, unrelated = 0, 0
    whole = [document.text for document in documents(text)]
    for batch, _ in batches(make_data(text, Masks(pairs=True), seq_len=32), 12):
        for tokens, segments, types, label in zip(
            batch.targets, batch.segments, batch.token_types, batch.unrelated, strict=True
        ):
            tokens, types = tokens[segments > 0], types[segments > 0]
            first, second = tokens[types == 0], tokens[types == 1]
            assert (first[0], first[-1], second[-1]) == (BOS, EOS, EOS)
            first, second = TOKENIZER.decode(first), TOKENIZER.decode(second)
            together = any(first + second in document for document in whole)
            if label:
                assert any(second in document for document in whole)
                unrelated += not together
            else:
                assert together
                related += 1
    assert related > 12
    assert unrelated > 12


def documents(text):
    source = Text(paths=(f'{text}/*.txt',), per='line').open()
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('kind', ['spans', 'ul2'])
def test_every_segment_gives_its_text_back(text, kind):
    """Over all rows, each document is there once (those of a single token are left out)."""
    corruption = dataclasses.replace(KINDS[kind], target_len=128)
    sentinels = corruption.ids(TOKENIZER)
    modes = corruption.modes(TOKENIZER)
    found = []
    for (packed, _), (batch, _) in zip(
        batches(make_data(text, None), 3), batches(make_data(text, corruption), 3), strict=True
    ):
        assert isinstance(batch, SourceBatch)
        np.testing.assert_array_equal(batch.weights, batch.segments > 0)
        for row in range(4):
            pieces = [packed.targets[row][packed.segments[row] == s] for s in range(1, packed.segments[row].max() + 1)]
            pieces = [piece for piece in pieces if len(piece) > 1 + (piece[-1] == EOS)]
            assert batch.segments[row].max() == batch.source_segments[row].max() == len(pieces)
            for segment, piece in enumerate(pieces, 1):
                source = batch.source[row][batch.source_segments[row] == segment]
                here = batch.segments[row] == segment
                target = batch.targets[row][here]
                assert batch.tokens[row][here].tolist() == [0, *target[:-1]]
                assert batch.positions[row][here].tolist() == list(range(len(target)))
                assert target[-1] == EOS
                if modes:
                    assert source[0] in modes
                    found.append(int(source[0]))
                    source = source[1:]
                assert restored(source, target[:-1], sentinels) == piece.tolist()
    assert set(found) == set(modes)


def restored(source, target, sentinels):
    spans, text = {}, []
    for token in target:
        if token in sentinels:
            spans[int(token)] = current = []
        else:
            current.append(int(token))
    for token in source.tolist():
        text += spans[token] if token in sentinels else [token]
    return text


def piece(size):
    return Piece(np.array([BOS, *range(10, 10 + size), EOS], np.int32), 0, size + 1)


def test_what_finds_no_room_is_left_out():
    """Of two texts of 20 tokens, each with targets of 3 hidden, a sentinel and the end mark, 9 places hold one."""
    config = Spans(target_len=9)
    write = config.make(TOKENIZER, 64)
    batch = forms.fill(
        config, write, [[piece(20), piece(20)], []], 64, [forms.generator(0, 0, i) for i in (0, 1)], None
    )
    assert batch.segments.tolist() == [[1] * 5 + [0] * 4, [0] * 9]
    assert (batch.source_segments[0] == 1).sum() == 20 - 3 + 1 + 1
    assert batch.source_segments.max() == 1


def test_a_prefix_is_a_beginning_that_is_not_asked_for(text):
    plain = batches(make_data(text, None), 3)
    given = 0
    for (packed, _), (batch, _) in zip(plain, batches(make_data(text, Prefix()), 3), strict=True):
        assert isinstance(batch, PrefixBatch)
        for name in ('tokens', 'targets', 'segments', 'positions'):
            np.testing.assert_array_equal(getattr(batch, name), getattr(packed, name))
        for row in range(4):
            for segment in range(1, batch.segments[row].max() + 1):
                here = batch.segments[row] == segment
                prefix, weights = batch.prefix[row][here], batch.weights[row][here]
                length = prefix.sum()
                assert prefix[:length].all()
                assert length < here.sum()
                # From the last given token on, targets are not given.
                assert weights.tolist() == [0.0] * max(length - 1, 0) + [1.0] * (len(weights) - max(length - 1, 0))
                given += length
    assert given > 0


@pytest.mark.parametrize('kind', KINDS)
def test_held_out_text_is_corrupted_in_the_same_way_each_time(text, kind):
    documents = Text(paths=(f'{text}/*.txt',)).open()
    data = make_data(text, KINDS[kind])
    one, other = (list(held_out_rows(data, documents, TOKENIZER, 16)) for _ in range(2))
    for batch, again in zip(one, other, strict=True):
        assert batch.tokens.shape[0] == 16
        same(batch, again)
    assert one[-1].weights[-1].sum() == 0  # rows that are not there ask for nothing


def test_ids_that_the_tokenizer_lacks_are_above_its_own():
    assert Masks().added(TOKENIZER) == 1
    assert Spans(target_len=9, sentinels=5).added(TOKENIZER) == 5
    assert UL2(target_len=9, sentinels=5).added(TOKENIZER) == 8
    assert Prefix().added(TOKENIZER) == 0

    class Marked(ByteTokenizer):
        vocab_size = 300
        special_tokens: ClassVar = {'<mask>': 260, **{f'<extra_id_{i}>': 299 - i for i in range(5)}}

    assert Masks().added(Marked()) == 0
    assert Spans(target_len=9, sentinels=5).ids(Marked()) == [299, 298, 297, 296, 295]
    assert Spans(target_len=9, sentinels=5).added(Marked()) == 0
    assert UL2(target_len=9, sentinels=5).modes(Marked()) == [300, 301, 302]


WRONG = [
    (Masks(rate=0.0), 'rate is 0.0; write the share of hidden tokens'),
    (Spans(target_len=9, rate=1.0), 'rate is 1.0; write the share of hidden tokens'),
    (Spans(target_len=9, mean=0.5), 'mean is 0.5; a hidden span has at least 1 token'),
    (Spans(target_len=2), 'target_len = 2 must be at least 3'),
    (UL2(target_len=9, sentinels=0), 'sentinels = 0 at least 1'),
]


@pytest.mark.parametrize(('config', 'message'), WRONG)
def test_settings_that_cannot_be_say_why(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_what_a_tokenizer_or_a_length_cannot_give_says_so():
    with pytest.raises(ConfigError, match='a tokenizer of ids only cannot read text'):
        Masks(whole_words=True).make(Ids(vocab_size=9, bos=1, eos=2).make([], ''), 64)
    with pytest.raises(ConfigError, match='sentinels = 3 are fewer than the 26 spans that rows of 512 tokens may have'):
        Spans(target_len=9, sentinels=3).make(TOKENIZER, 512)
    with pytest.raises(ConfigError, match='seq_len is 4; two texts and their marks need at least 5'):
        Masks(pairs=True).make(TOKENIZER, 4)


def test_a_source_of_one_text_has_no_other(tmp_path):
    (tmp_path / 'one.txt').write_text('only this')
    data = make_data(tmp_path, Masks(pairs=True))
    with pytest.raises(ConfigError, match='1000 documents in a row of a source are bad, empty or the same'):
        batches(data, 8)

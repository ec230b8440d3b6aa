"""What is hidden: how much, where, and that the text can be had back; every number is of the published formulas."""

import math

import numpy as np
import pytest

from tpu_llm.data import corruption
from tpu_llm.data.tokenizer import ByteTokenizer

MASK, VOCAB = 500, 500


def rng(*seed):
    return np.random.default_rng(seed)


def masked(count, seed=0, words=None, rate=0.15):
    tokens = rng(9).integers(0, VOCAB, count).astype(np.int32)
    words = np.arange(count) if words is None else words
    return tokens, *corruption.mask_tokens(tokens, words, rng(seed), rate=rate, mask=MASK, vocab_size=VOCAB)


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize('count', [1, 2, 7, 100, 511])
def test_as_many_tokens_are_chosen_as_the_rate_says(count):
    tokens, hidden, chosen = masked(count)
    assert chosen.sum() == max(1, round(0.15 * count))
    np.testing.assert_array_equal(hidden[~chosen], tokens[~chosen])
    assert hidden.dtype == np.int32


def test_of_the_chosen_80_are_masked_10_random_and_10_kept():
    """Within four standard deviations; one in VOCAB of the random ones is the token itself."""
    tokens, hidden, chosen = masked(200_000)
    n = chosen.sum()
    kept = hidden[chosen] == tokens[chosen]
    is_mask = hidden[chosen] == MASK
    for share, expected in ((is_mask.mean(), 0.8), (kept.mean(), 0.1 + 0.1 / VOCAB)):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    drawn = hidden[chosen][~kept & ~is_mask]
    assert len(np.unique(drawn)) == VOCAB  # all of the vocabulary
    assert abs(drawn.mean() - (VOCAB - 1) / 2) < 4 * VOCAB / math.sqrt(12 * len(drawn))


def test_every_place_is_as_likely():
    counts = sum(masked(20, seed)[2] for seed in range(2000))
    expected = 2000 * 3 / 20
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_words_are_hidden_whole_and_never_more_than_the_rate():
    words = np.repeat(np.arange(40), [1, 2, 3, 4] * 10)
    words[:4] = corruption.NEVER
    free = round(0.15 * (words != corruption.NEVER).sum())
    sizes = []
    for seed in range(50):
        _, _, chosen = masked(len(words), seed, words)
        assert not chosen[:4].any()
        for word in np.unique(words):
            assert len(set(chosen[words == word])) == 1
        sizes.append(chosen.sum())
    assert max(sizes) <= free
    assert np.mean(sizes) > free - 0.5  # only the last word may not fit


def test_it_is_a_function_of_its_seed():
    for same, other in zip(masked(50, 3), masked(50, 3), strict=True):
        np.testing.assert_array_equal(same, other)
    assert (masked(50, 3)[2] != masked(50, 4)[2]).any()


def starts(tokenizer, text):
    ids = tokenizer.encode(text)
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(corruption.WordStarts(tokenizer)(ids))[1:])]


def test_words_begin_after_white_space(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        words = starts(tokenizer, 'an import of\nsomething unusual')
        assert [word.strip() for word in words if word.strip()] == ['an', 'import', 'of', 'something', 'unusual']


# ---------------------------------------------------------------------------------------------------------- spans


def restored(source, target, sentinels):
    """The text, from what is left of it and what was cut out."""
    spans, text = {}, []
    for token in target:
        if token in sentinels:
            spans[int(token)] = current = []
        else:
            current.append(token)
    for token in source:
        text += spans[int(token)] if token in sentinels else [token]
    return text


SENTINELS = list(range(1000, 1300))


@pytest.mark.parametrize('denoiser', [corruption.Denoiser(0.15, 3.0), *corruption.UL2], ids=str)
@pytest.mark.parametrize('length', [2, 3, 10, 57, 512])
def test_spans_have_the_published_lengths_and_the_text_comes_back(denoiser, length):
    text = np.arange(length)
    source, target = denoiser.hide(text, SENTINELS, rng(length))
    hidden = min(max(round(denoiser.rate * length), 1), length - 1)
    spans = min(max(round(hidden / (denoiser.mean or length)), 1), hidden, length - hidden)
    assert len(source) == length - hidden + spans
    assert len(target) == hidden + spans
    for side in (source, target):
        assert side[side >= 1000].tolist() == SENTINELS[:spans]
    assert restored(source, target, SENTINELS) == text.tolist()
    assert source[0] == 0  # the text begins with what is kept
    assert source[-1] >= 1000  # and ends with what is hidden
    assert spans <= corruption.most_spans(length, denoiser.rate, denoiser.mean or length)


def test_t5s_row_is_that_of_the_paper():
    """568 tokens make 512 with the end mark, and targets of 114 with theirs (as computed by the published code)."""
    source, target = corruption.Denoiser(0.15, 3.0).hide(np.arange(568), SENTINELS, rng(0))
    assert (len(source) + 1, len(target) + 1) == (512, 114)


def test_the_sequential_denoiser_hides_one_span_at_the_end():
    source, target = corruption.UL2[2].hide(np.arange(100), SENTINELS, rng(0))
    assert source.tolist() == [*range(75), 1000]
    assert target.tolist() == [1000, *range(75, 100)]


def test_all_ways_to_cut_are_as_likely():
    """Into 3 of 5 there are C(4, 2) = 6."""
    found = [tuple(corruption._cut(5, 3, rng(i))) for i in range(1200)]
    counts = {way: found.count(way) for way in set(found)}
    assert len(counts) == math.comb(4, 2)
    assert max(abs(count - 200) for count in counts.values()) < 5 * math.sqrt(200)


def test_ul2_is_the_published_seven():
    table = {(0.15, 3, '[NLU]'), (0.15, 8, '[NLU]'), (0.25, 0, '[S2S]'), (0.5, 3, '[NLG]'), (0.5, 8, '[NLG]')}
    table |= {(0.15, 64, '[NLG]'), (0.5, 64, '[NLG]')}
    assert {(d.rate, d.mean, corruption.MODES[d.mode]) for d in corruption.UL2} == table


def test_prefixes_are_as_likely_from_none_to_all_but_one():
    lengths = [corruption.prefix_length(4, rng(i)) for i in range(1000)]
    assert sorted(set(lengths)) == [0, 1, 2, 3]
    assert max(abs(lengths.count(n) - 250) for n in range(4)) < 5 * math.sqrt(250)

"""Log-probs of continuations against the whole row's, in NumPy and for every way in which what is read is shared."""

import functools

import jax
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import ByteTokenizer
from tpu_llm.evals import likelihood
from tpu_llm.evals.continuations import Encoder, Pair, shorten, windows
from tpu_llm.evals.likelihood import Likelihoods
from tpu_llm.nn.mamba import Mamba

SHOTS = 'What is two and two? Four. What is one and one? Two. '
REQUESTS = [
    *(
        (f'{SHOTS}What is {n} and one?', option)
        for n in ('six', 'eleven', 'a', 'five', 'no')
        for option in (' N', ' more')
    ),
    ('', 'Once'),
    ('Alone ', 'x'),
    ('Alone ', 'x'),
    ('Quite another beginning, and no other question begins like it:', ' y'),
]


@pytest.fixture(scope='module')
def tokenizer():
    return ByteTokenizer()


def model_of(**changes):
    graph = toy.graph(toy.config(vocab_size=259, layers=2, max_length=512, **changes))
    return graph.bind(toy.weights(graph))


@pytest.fixture(scope='module')
def model():
    return model_of()


@pytest.fixture(scope='module')
def likelihoods(model, tokenizer):
    return Likelihoods(model, tokenizer, rows=4)


@functools.cache
def compiled(model):
    return jax.jit(model)


def whole_row(model, before, after):
    """float64 log p of `after`, and whether each is the likeliest, from all logits of one row."""
    ids = np.concatenate([before, after])
    logits = np.asarray(compiled(model)(np.pad(ids, (0, 128 - len(ids)))[None]), np.float64)[0]
    logits = logits[len(before) - 1 : len(ids) - 1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_probs[np.arange(len(after)), after].sum(), bool((logits.argmax(axis=1) == after).all())


def agree(model, likelihoods, requests):
    for pair, found in zip(likelihoods.encoder.pairs(requests), likelihoods(requests), strict=True):
        log_prob, greedy = whole_row(model, pair.context, pair.continuation)
        assert found.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert found.greedy == greedy
        assert found.tokens == len(pair.continuation)


def test_as_whole_rows_have_it(model, likelihoods):
    agree(model, likelihoods, REQUESTS)
    assert likelihoods.cut == 0


@pytest.mark.parametrize(
    'changes',
    [{'position': 'learned'}, {'windows': (7,)}, {'mixers': ('ssm', 'attention'), 'ssm': Mamba()}],
    ids=['learned', 'window', 'ssm'],
)
def test_of_other_models(changes, tokenizer, quick_compile):
    model = model_of(**changes)
    agree(model, Likelihoods(model, tokenizer, rows=4), REQUESTS)


def test_the_likeliest_continuation_is_greedy(model, likelihoods, tokenizer):
    context, ids = 'A begin', tokenizer.encode('A begin')
    pair = likelihoods.encoder.pairs([(context, '!')])[0]
    written = []
    for _ in range(3):
        row = np.concatenate([pair.context, np.asarray(written, np.int32)])
        logits = compiled(model)(np.pad(row, (0, 128 - len(row)))[None])
        written.append(int(np.asarray(logits)[0, len(row) - 1].argmax()))
    found = likelihoods.of_ids([Pair(pair.context, np.asarray(written, np.int32))])
    other = likelihoods.of_ids([Pair(pair.context, np.asarray([*written[:2], written[2] ^ 1], np.int32))])
    assert (found[0].greedy, other[0].greedy) == (True, False)
    assert len(pair.context) == len(ids) + 1


def test_with_the_weights_of_another_step(model, likelihoods, tokenizer):
    other = toy.weights(toy.graph(toy.config(vocab_size=259, layers=2, max_length=512)), seed=1)
    requests = REQUESTS[-3:]
    now = likelihoods(requests, other)
    graph = toy.graph(toy.config(vocab_size=259, layers=2, max_length=512))
    agreed = [
        whole_row(graph.bind(other), pair.context, pair.continuation)[0] for pair in likelihoods.encoder.pairs(requests)
    ]
    assert [each.log_prob for each in now] == pytest.approx(agreed, abs=1e-4)


def test_what_contexts_begin_with_is_read_once(model, tokenizer):
    done = []
    likelihoods = Likelihoods(model, tokenizer, rows=4, heard=lambda tokens, of: done.append((tokens, of)))
    contexts = [likelihood._Context(pair.context, []) for pair in likelihoods.encoder.pairs(REQUESTS[:10:2])]
    ((common, group),) = likelihood._alike(contexts)
    assert common == len(tokenizer.encode(SHOTS + 'What is ')) + 1
    assert len(group) == 5
    likelihoods(REQUESTS)
    assert done[-1][0] == done[-1][1]


def test_groups_leave_each_context_a_token_and_take_no_few():
    context = np.arange(100, dtype=np.int32)
    alike = [likelihood._Context(context[:length], []) for length in (60, 61, 62, 100)]
    assert [(common, len(group)) for common, group in likelihood._alike(alike)] == [(59, 4)]
    assert [(common, len(group)) for common, group in likelihood._alike(alike[:3])] == [(0, 3)]
    assert list(likelihood._alike([])) == []


def test_whole_texts_in_windows(model, tokenizer):
    text = 'A text that is longer than a window, and longer than two of them too, is read in three.'
    likelihoods = Likelihoods(model, tokenizer, rows=4, max_length=40)
    (found, short, nothing) = likelihoods.rolling([text, 'ab', ''])
    ids, total = tokenizer.encode(text), 0.0
    framed = np.concatenate([[tokenizer.bos], ids]).astype(np.int32)
    for start, end in ((0, 40), (40, 80), (80, len(ids))):
        first = max(0, end - 40)
        total += whole_row(model, framed[first : start + 1], ids[start:end])[0]
    assert found.log_prob == pytest.approx(total, abs=1e-3)
    assert (found.tokens, found.bytes) == (len(ids), len(text))
    assert (short.tokens, nothing.tokens, nothing.log_prob) == (2, 0, 0.0)
    assert likelihoods.cut == 0


@pytest.mark.parametrize('length', [1, 39, 40, 41, 80, 99])
def test_windows_are_those_of_the_published_rule(length):
    """Each id once, and each window but a text that is shorter reads as many ids as there is room for."""
    ids = np.arange(length, dtype=np.int32)
    made = windows(ids, 255, 40)
    assert np.concatenate([pair.continuation for pair in made]).tolist() == ids.tolist()
    assert made[0].context.tolist() == [255]
    for pair in made:
        read = len(pair.context) + len(pair.continuation) - 1
        assert read == min(40, length)
        assert pair.context[-1] == (pair.continuation[0] - 1 if pair.continuation[0] else 255)


def test_too_long_contexts_lose_their_beginning(model, tokenizer):
    likelihoods = Likelihoods(model, tokenizer, rows=4, max_length=24)
    (found,) = likelihoods([('x' * 10 + 'A context that is much too long for it', ' end')])
    after = tokenizer.encode(' end')
    before = tokenizer.encode('A context that is much too long for it')[len(after) - 25 :]
    assert found.log_prob == pytest.approx(whole_row(model, before, after)[0], abs=1e-4)
    assert likelihoods.cut == 1


def test_spaces_move_to_the_continuation(tokenizer):
    spaced, plain = Encoder(tokenizer, False).pairs([('A? ', 'b'), ('A?', ' b')])
    assert spaced.context.tolist() == plain.context.tolist() == [1, *tokenizer.encode('A?')]
    assert spaced.continuation.tolist() == plain.continuation.tolist() == tokenizer.encode(' b').tolist()


def test_what_cannot_be_scored(model, likelihoods, tokenizer):
    with pytest.raises(ValueError, match="the continuation '' adds no token to its context 'A'"):
        likelihoods([('A', '')])
    with pytest.raises(ValueError, match='25 tokens is longer than max_length = 24; score it by rolling'):
        shorten(Pair(np.ones(3, np.int32), np.ones(25, np.int32)), 24)
    with pytest.raises(ConfigError, match='max_length is 600; the model has 512 learned positions'):
        Likelihoods(model_of(position='learned'), tokenizer, max_length=600)
    with pytest.raises(ConfigError, match='rows is 0'):
        Likelihoods(model, tokenizer, rows=0)
    with pytest.raises(ConfigError, match=r'ids up to 258 but model\.vocab_size is 19'):
        Likelihoods(toy.graph(toy.config()).bind(toy.weights(toy.graph(toy.config()))), tokenizer)

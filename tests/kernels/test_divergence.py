"""Divergences of a student from a teacher, against float64 NumPy: values, gradients, layouts, memory."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.kernels.divergence import Head, Likely, Options, divergence, likely_divergence
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

ROWS, LENGTH, SIZE, VOCAB = 4, 6, 10, 16  # 10 real tokens in a padded vocabulary of 16
CASES = {
    'forward': Options(kind='forward', vocab_size=SIZE, chunk=4),
    'forward, warm': Options(kind='forward', vocab_size=SIZE, temperature=3.0, chunk=2),
    'forward, no padding': Options(kind='forward', vocab_size=VOCAB),
    'reverse': Options(kind='reverse', vocab_size=SIZE, chunk=1),
    'reverse, warm, labels': Options(kind='reverse', vocab_size=SIZE, temperature=0.5, labels=0.7, chunk=3),
    'jensen-shannon': Options(kind='jensen_shannon', vocab_size=SIZE),
    'near the teacher': Options(kind='jensen_shannon', vocab_size=SIZE, beta=0.1, labels=0.2),
    'everything': Options(
        kind='jensen_shannon', vocab_size=SIZE, beta=0.9, temperature=2.0, labels=0.5, softcap=1.5, teacher_softcap=0.8
    ),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# The teacher is wider, and has no bias.
ARRAYS = (normal(0, ROWS, LENGTH, 4), normal(1, 4, VOCAB), normal(2, VOCAB))
TEACHER = Head(normal(3, ROWS, LENGTH, 8), normal(4, 8, VOCAB), None, jnp.dtype('float32'))
TARGETS = np.random.default_rng(5).integers(0, SIZE, (ROWS, LENGTH))
WEIGHTS = np.array([[1, 1, 0, 1, 0, 0], [0.5, 2, 1, 1, 1, 1], [0] * 6, [1] * 6], np.float32)


def run(options, arrays=ARRAYS, teacher=TEACHER):
    """The three sums and the loss's gradients of the student's arrays."""

    def loss(*arrays):
        loss, *others = divergence(Head(*arrays, jnp.dtype('float32')), teacher, TARGETS, WEIGHTS, options)
        return loss, others

    (loss, others), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return (loss, *others), gradients


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def head(hidden, kernel, bias, softcap, size):
    logits = (np.einsum('btd,dv->btv', *(np.asarray(x, np.float64) for x in (hidden, kernel))))[..., :size]
    logits = logits if bias is None else logits + np.asarray(bias, np.float64)[:size]
    return softcap * np.tanh(logits / softcap) if softcap else logits


def formula(options, arrays=ARRAYS, teacher=TEACHER):
    """The same in float64, as the papers write it."""
    theirs = head(*teacher[:3], options.teacher_softcap, options.vocab_size)
    logits = head(*arrays, options.softcap, options.vocab_size)
    log_p, log_q = (log_softmax(x / options.temperature) for x in (theirs, logits))
    p, q = np.exp(log_p), np.exp(log_q)
    if options.kind == 'jensen_shannon':
        log_m = np.logaddexp(np.log(options.beta) + log_p, np.log(1 - options.beta) + log_q)
        each = options.beta * p * (log_p - log_m) + (1 - options.beta) * q * (log_q - log_m)
    else:
        each = p * (log_p - log_q) if options.kind == 'forward' else q * (log_q - log_p)
    apart = each.sum(-1)
    nll = -np.take_along_axis(log_softmax(logits), TARGETS[..., None], -1)[..., 0]
    loss = options.temperature**2 * apart + options.labels * nll
    return [(x * WEIGHTS).sum() for x in (loss, apart, nll)]


@pytest.mark.parametrize('case', CASES)
def test_it_is_that_of_float64_numpy(case):
    options = CASES[case]
    sums, gradients = run(options)
    np.testing.assert_allclose(sums, formula(options), rtol=2e-6)
    # Without a gradient to compute, another program runs.
    alone = divergence(Head(*ARRAYS, jnp.dtype('float32')), TEACHER, TARGETS, WEIGHTS, options)
    np.testing.assert_allclose(alone, sums, rtol=1e-6)
    random = np.random.default_rng(6)
    for i, gradient in enumerate(gradients):
        for _ in range(4):
            direction = random.standard_normal(gradient.shape)
            moved = []
            for sign in (1, -1):
                arrays = [np.asarray(x, np.float64) for x in ARRAYS]
                arrays[i] += sign * 1e-6 * direction
                moved.append(formula(options, arrays)[0])
            slope = (moved[0] - moved[1]) / 2e-6
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)
    padding = slice(options.vocab_size, None)
    assert not np.asarray(gradients[1])[:, padding].any()
    assert not np.asarray(gradients[2])[padding].any()


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'jensen_shannon'])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    (loss, apart, nll), gradients = run(Options(kind=kind, vocab_size=SIZE), teacher=Head(*ARRAYS, jnp.dtype('f')))
    np.testing.assert_allclose((loss, apart), 0.0, atol=1e-5)
    assert nll > 1
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'jensen_shannon'])
def test_certainty_of_either_is_finite(kind):
    """Logits some hundreds apart: probabilities underflow, their logs do not."""
    arrays = (ARRAYS[0] * 200, *ARRAYS[1:])
    teacher = TEACHER._replace(hidden=TEACHER.hidden * -200)
    sums, gradients = run(Options(kind=kind, vocab_size=SIZE), arrays, teacher)
    np.testing.assert_allclose(sums, formula(Options(kind=kind, vocab_size=SIZE), arrays, teacher), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


def test_between_the_ends_it_tends_to_them():
    """Over β and 1 − β (Agarwal et al., 2023, section 2)."""
    for beta, kind, share in ((1e-3, 'forward', 1e-3), (1 - 1e-3, 'reverse', 1e-3)):
        between = run(Options(kind='jensen_shannon', beta=beta, temperature=3.0, vocab_size=SIZE))[0][1]
        end = run(Options(kind=kind, temperature=3.0, vocab_size=SIZE))[0][1]
        np.testing.assert_allclose(between / share, end, rtol=0.02)


def test_the_teacher_gets_no_gradient():
    def loss(hidden, kernel):
        teacher = TEACHER._replace(hidden=hidden, kernel=kernel)
        return divergence(Head(*ARRAYS, jnp.dtype('f')), teacher, TARGETS, WEIGHTS, CASES['reverse'])[0]

    for gradient in jax.grad(loss, argnums=(0, 1))(*TEACHER[:2]):
        assert not np.asarray(gradient).any()


LIKELY = {
    'forward': Options(kind='forward', vocab_size=SIZE, chunk=4),
    'reverse': Options(kind='reverse', vocab_size=SIZE, labels=0.7, softcap=1.5),
    'jensen-shannon': Options(kind='jensen_shannon', vocab_size=SIZE, beta=0.3, chunk=1),
}


def kept(count):
    """The teacher's likeliest tokens."""
    log_p = log_softmax(head(*TEACHER[:3], 0.0, SIZE))
    order = np.argsort(-log_p, axis=-1, kind='stable')
    first, others = (np.take_along_axis(log_p, part, -1) for part in np.split(order, [count], axis=-1))
    return Likely(
        jnp.asarray(order[..., :count], jnp.int32),
        jnp.asarray(first, jnp.float32),
        jnp.asarray(np.log(np.exp(others).sum(-1)), jnp.float32),
    )


def run_likely(options, likely):
    def loss(*arrays):
        loss, *others = likely_divergence(Head(*arrays, jnp.dtype('f')), likely, TARGETS, WEIGHTS, options)
        return loss, others

    (loss, others), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*ARRAYS)
    return (loss, *others), gradients


def likely_formula(options, likely, arrays=ARRAYS):
    """Sums of probabilities, token by token, in float64."""
    log_q = log_softmax(head(*arrays, options.softcap, SIZE))
    tokens = np.asarray(likely.tokens)
    first = np.take_along_axis(np.exp(log_q), tokens, -1)
    q = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], -1)
    p = np.exp(np.concatenate([likely.log_probs, likely.rest[..., None]], -1, dtype=np.float64))
    p = p / p.sum(-1, keepdims=True)
    m = options.beta * p + (1 - options.beta) * q
    apart = {
        'forward': p * np.log(p / q),
        'reverse': q * np.log(q / p),
        'jensen_shannon': options.beta * p * np.log(p / m) + (1 - options.beta) * q * np.log(q / m),
    }[options.kind].sum(-1)
    nll = -np.take_along_axis(log_q, TARGETS[..., None], -1)[..., 0]
    return [(x * WEIGHTS).sum() for x in (apart + options.labels * nll, apart, nll)]


@pytest.mark.parametrize('case', LIKELY)
def test_of_the_likeliest_tokens_it_is_that_of_float64_numpy(case):
    options, likely = LIKELY[case], kept(4)
    sums, gradients = run_likely(options, likely)
    np.testing.assert_allclose(sums, likely_formula(options, likely), rtol=1e-5)
    assert sums[1] < run(dataclasses.replace(options, labels=0.0))[0][1] or options.softcap
    random = np.random.default_rng(7)
    for i, gradient in enumerate(gradients):
        for _ in range(4):
            direction = random.standard_normal(gradient.shape)
            moved = []
            for sign in (1, -1):
                arrays = [np.asarray(x, np.float64) for x in ARRAYS]
                arrays[i] += sign * 1e-6 * direction
                moved.append(likely_formula(options, likely, arrays)[0])
            slope = (moved[0] - moved[1]) / 2e-6
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_all_tokens_but_one_are_all_of_them():
    """The rest is then the last: the divergence is that of whole distributions, and so is its gradient."""
    whole, part = run(CASES['forward']), run_likely(CASES['forward'], kept(SIZE - 1))
    for a, e in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('axes', [{'tensor': 4}, {'fsdp': 2, 'tensor': 2, 'data': 2}])
def test_the_likeliest_tokens_of_a_split_vocabulary(axes):
    expected = run_likely(LIKELY['reverse'], kept(4))
    with sharding.use(toy.layout(**axes)):
        found = run_likely(LIKELY['reverse'], kept(4))
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('axes', [{'tensor': 4}, {'fsdp': 2, 'tensor': 2, 'data': 2}])
def test_a_split_vocabulary_gives_what_one_device_gives(axes):
    for case in ('forward, warm', 'everything'):
        expected = run(CASES[case])
        with sharding.use(toy.layout(**axes)):
            found = run(CASES[case])
        for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_whole_logits_exist_nowhere_in_the_program():
    options = dataclasses.replace(CASES['everything'], chunk=2)
    rows, length = 4, 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, 5), (5, VOCAB), (VOCAB,))]
    seen = jax.ShapeDtypeStruct((rows, length, 6), jnp.float32)

    def loss(hidden, kernel, bias, seen):
        teacher = Head(seen, jnp.ones((6, VOCAB)), None, jnp.dtype('f'))
        targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))
        return divergence(Head(hidden, kernel, bias, jnp.dtype('f')), teacher, targets, weights, options)[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, seen).compile().as_text()
    largest = max(math.prod(map(int, dims.split(','))) for dims in re.findall(r'f32\[([\d,]+)\]', text))
    assert largest == rows * length * 6, 'the teacher’s hidden states'

"""The optimizer for another batch size, and how large a batch is worth its tokens."""

import numpy as np
import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.optim.batch import for_batch, noise_scale
from tpu_llm.optim.optimizer import SGD, AdamW, Lion
from tpu_llm.optim.schedule import Schedule


def adam(**fields):
    return AdamW(schedule=Schedule(peak=1e-3, warmup=100), weight_decay=0.1, **fields)


def test_adam_takes_the_square_root_and_keeps_its_memory_in_tokens():
    new = for_batch(adam(b1=0.9, b2=0.95, eps=1e-8), 4)
    assert new.schedule.peak == pytest.approx(2e-3)
    assert (new.b1, new.b2) == (pytest.approx(0.6), pytest.approx(0.8))
    assert new.eps == pytest.approx(5e-9)
    # A quarter of the steps take as much off a weight as all of them did.
    assert new.schedule.peak * new.weight_decay / 4 == pytest.approx(1e-3 * 0.1)
    assert new.schedule.warmup == 25
    validate(new)


def test_it_goes_back_the_same_way():
    old = adam()
    back = for_batch(for_batch(old, 4), 0.25)
    assert (back.b1, back.b2, back.eps, back.weight_decay) == pytest.approx((old.b1, old.b2, old.eps, old.weight_decay))
    assert (back.schedule.peak, back.schedule.warmup) == pytest.approx((1e-3, 100))


def test_the_given_optimizer_stays_as_it_is():
    old = adam()
    for_batch(old, 4)
    assert old == adam()


def test_sgd_grows_with_the_batch_and_a_warmup_in_shares_stays():
    new = for_batch(SGD(schedule=Schedule(peak=0.1, warmup=0.2), momentum=0.9), 3)
    assert (new.schedule.peak, new.schedule.warmup, new.momentum) == (pytest.approx(0.3), 0.2, 0.9)


@pytest.mark.parametrize(
    ('optimizer', 'times', 'message'),
    [
        (adam(), 10, 'keep it below 10 times'),
        (Lion(schedule=Schedule(peak=1.0)), 2, 'no rule is known for Lion'),
        (adam(), 0, 'how many times the batch'),
    ],
)
def test_what_no_rule_covers_is_refused(optimizer, times, message):
    with pytest.raises(ConfigError, match=message):
        for_batch(optimizer, times)


def test_the_noise_scale_is_that_of_gradients_drawn_around_their_mean():
    """E|G_B|² = |G|² + tr(Σ) / B."""
    random = np.random.default_rng(0)
    mean, deviation = random.standard_normal(50), np.linspace(0.5, 3.0, 50)

    def square(size):
        batches = mean + deviation * random.standard_normal((20_000, 50)) / np.sqrt(size)
        return size, float((batches**2).sum(axis=1).mean())

    assert noise_scale(square(4), square(64)) == pytest.approx((deviation**2).sum() / (mean**2).sum(), rel=0.02)


@pytest.mark.parametrize(
    ('small', 'large', 'message'),
    [
        ((8, 1.0), (4, 1.0), 'the smaller first'),
        ((4, 1.0), (8, 1.5), 'over more batches'),
        ((4, 3.0), (8, 1.0), 'over more batches'),
    ],
)
def test_means_that_tell_nothing_are_refused(small, large, message):
    with pytest.raises(ConfigError, match=message):
        noise_scale(small, large)

"""Advantages against their definitions, written out one number at a time."""

import numpy as np
import pytest

from tpu_llm.rl import advantages

RANDOM = np.random.default_rng(0)
REWARDS = RANDOM.normal(size=12)
GROUP = 4
MASK = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], float)
TOKENS, VALUES = RANDOM.normal(size=(2, *MASK.shape))


def groups():
    return [range(start, start + GROUP) for start in range(0, len(REWARDS), GROUP)]


@pytest.mark.parametrize('scale', [True, False])
def test_group_relative(scale):
    expected = np.empty(12)
    for group in groups():
        mean = sum(REWARDS[i] for i in group) / GROUP
        spread = (sum((REWARDS[i] - mean) ** 2 for i in group) / (GROUP - 1)) ** 0.5
        for i in group:
            expected[i] = (REWARDS[i] - mean) / (spread + 1e-4 if scale else 1)
    np.testing.assert_allclose(advantages.grpo(REWARDS, GROUP, scale=scale), expected, rtol=1e-12)


def test_leave_one_out():
    expected = [
        REWARDS[i] - sum(REWARDS[j] for j in group if j != i) / (GROUP - 1) for group in groups() for i in group
    ]
    np.testing.assert_allclose(advantages.rloo(REWARDS, GROUP), expected, rtol=1e-12)


def test_equal_rewards_teach_nothing():
    for advantage in (advantages.grpo, advantages.rloo):
        np.testing.assert_array_equal(advantage(np.full(8, 0.3), GROUP), 0)


def test_rewards_come_at_the_end_and_the_penalty_at_each_token():
    given = advantages.per_token(np.array([1.0, 2, 3, 4]), TOKENS, MASK, 0.5)
    expected = -0.5 * TOKENS * MASK
    expected[0, 3] += 1
    expected[1, 1] += 2
    expected[3, 4] += 4
    np.testing.assert_allclose(given, expected)


def test_returns_to_go():
    found = advantages.returns_to_go(TOKENS * MASK, MASK, discount=0.9)
    for row, t in np.argwhere(MASK):
        rest = sum(0.9 ** (s - t) * TOKENS[row, s] * MASK[row, s] for s in range(t, 5))
        assert found[row, t] == pytest.approx(rest)
    assert not found[MASK == 0].any()


def test_generalized_advantages():
    """The sum of discounted errors of the critic from each token to the response's end."""
    given, discount, decay = TOKENS * MASK, 0.9, 0.8
    found, returns = advantages.gae(given, VALUES, MASK, discount=discount, decay=decay)
    for row, t in np.argwhere(MASK):
        expected = 0.0
        for s in np.flatnonzero(MASK[row]):
            if s >= t:
                after = VALUES[row, s + 1] if s + 1 < 5 and MASK[row, s + 1] else 0.0
                expected += (discount * decay) ** (s - t) * (given[row, s] + discount * after - VALUES[row, s])
        assert found[row, t] == pytest.approx(expected)
        assert returns[row, t] == pytest.approx(expected + VALUES[row, t])
    assert not found[MASK == 0].any()
    assert not returns[MASK == 0].any()


def test_at_decay_one_the_advantage_is_the_return_less_the_value():
    found, returns = advantages.gae(TOKENS * MASK, VALUES, MASK, discount=1.0, decay=1.0)
    np.testing.assert_allclose(returns, advantages.returns_to_go(TOKENS * MASK, MASK), atol=1e-12)
    np.testing.assert_allclose(found, (returns - VALUES) * MASK, atol=1e-12)


def test_whitening():
    white = advantages.whiten(TOKENS, MASK)
    assert white[MASK > 0].mean() == pytest.approx(0, abs=1e-12)
    assert white[MASK > 0].std() == pytest.approx(1, rel=1e-6)
    assert not white[MASK == 0].any()
    kept = advantages.whiten(TOKENS, MASK, shift=False)
    assert kept[MASK > 0].mean() == pytest.approx(TOKENS[MASK > 0].mean())

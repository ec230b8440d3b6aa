"""Weights are shares of tokens; a mixture that cannot be is refused with one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_llm.config import ConfigError, validate
from tpu_llm.data.mixture import Mixture, most_behind, uniform
from tpu_llm.data.sources import Stdlib

SOURCES = {'a': Stdlib(), 'b': Stdlib(), 'c': Stdlib()}


def test_stages_are_normalized_and_sorted() -> None:
    mixture = Mixture(sources=SOURCES, weights={7: {'c': 2.0}, 0: {'a': 3.0, 'b': 1.0}})
    validate(mixture)
    assert mixture.stages() == [(0, [0.75, 0.25, 0.0]), (7, [0.0, 0.0, 1.0])]
    assert Mixture(sources={'a': Stdlib()}).stages() == [(0, [1.0])]


@pytest.mark.parametrize(
    ('mixture', 'message'),
    [
        (Mixture(sources={}), 'sources is empty'),
        (Mixture(sources=SOURCES), r"weights is empty; give shares, such as weights=\{0: \{'a': 1.0, 'b'"),
        (Mixture(sources=SOURCES, weights={3: {'a': 1.0}}), 'weights starts at step 3; the first stage starts at 0'),
        (
            Mixture(sources=SOURCES | {'books': Stdlib()}, weights={0: {'book': 1.0}}),
            r"weights\[0\] names 'book', which is no source \(did you mean 'books'\?\)",
        ),
        (Mixture(sources=SOURCES, weights={0: {'a': -1.0, 'b': 2.0}}), r"weights\[0\]\['a'\] is -1.0; a share cannot"),
        (Mixture(sources=SOURCES, weights={0: {'a': 1}, 5: {'a': 0}}), r'weights\[5\] gives no source anything'),
    ],
)
def test_mistakes(mixture: Mixture, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(mixture)


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=5).filter(any),
    st.lists(st.integers(1, 500), min_size=200, max_size=200),
)
def test_tokens_stay_near_their_shares(weights: list[int], lengths: list[int]) -> None:
    total = sum(weights)
    shares = [weight / total for weight in weights]
    emitted = [0] * len(shares)
    for length in lengths:
        source = most_behind(emitted, shares)
        assert shares[source] > 0
        emitted[source] += length
        # Of two sources that are drawn from, neither is a document ahead of the other, in units of its weight.
        served = [e / s for e, s in zip(emitted, shares, strict=True) if s]
        assert max(served) - min(served) <= max(lengths) / min(s for s in shares if s) + 1e-6


def test_equal_needs_take_the_first() -> None:
    assert most_behind([0, 0, 0], [0.0, 0.5, 0.5]) == 1


def test_pseudo_random_numbers_depend_on_their_parts_alone() -> None:
    assert uniform(0, 'debt', 3, 'web') == uniform(0, 'debt', 3, 'web')
    numbers = [uniform(seed, lane) for seed in range(20) for lane in range(50)]
    assert len(set(numbers)) == 1000
    assert 0.45 < sum(numbers) / 1000 < 0.55
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1

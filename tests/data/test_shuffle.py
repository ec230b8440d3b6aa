"""Each epoch is a permutation, all permutations are about equally likely, and the order is pinned."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_llm.data.shuffle import Shuffle


@given(st.integers(1, 400), st.integers(0, 10**6), st.integers(0, 2**40))
def test_every_epoch_holds_every_number_once(length: int, epoch: int, seed: int) -> None:
    shuffle = Shuffle(length, seed)
    assert sorted(shuffle[epoch * length + i] for i in range(length)) == list(range(length))


@pytest.mark.parametrize('length', [2, 3, 4, 5])
def test_permutations_are_equally_likely(length: int) -> None:
    shuffle, epochs = Shuffle(length, 'seed'), 3000
    seen = Counter(tuple(shuffle[e * length + i] for i in range(length)) for e in range(epochs))
    expected, free = epochs / math.factorial(length), math.factorial(length) - 1
    chi = sum((seen[p] - expected) ** 2 / expected for p in itertools.permutations(range(length)))
    assert chi < free + 4 * math.sqrt(2 * free)  # four standard deviations of chi squared


def test_neighbours_and_epochs_are_unrelated() -> None:
    n = 10_000
    shuffle = Shuffle(n, 0)
    first, second = [shuffle[i] for i in range(n)], [shuffle[n + i] for i in range(n)]

    def correlation(x: list[int], y: list[int]) -> float:
        mean, variance = (n - 1) / 2, (n * n - 1) / 12
        return sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True)) / n / variance

    for other in (list(range(n)), second, first[1:] + first[:1], first[100:] + first[:100]):
        assert abs(correlation(first, other)) < 5 / math.sqrt(n)


def test_the_order_is_pinned() -> None:
    # If these change, no run goes on from an older checkpoint.
    assert [Shuffle(12, 0, 'web')[i] for i in range(24)] == [
        5,
        6,
        9,
        10,
        7,
        1,
        11,
        3,
        2,
        0,
        8,
        4,
        5,
        7,
        3,
        8,
        9,
        0,
        11,
        2,
        4,
        1,
        10,
        6,
    ]
    assert [Shuffle(10**12, 0, 'web')[i] for i in range(3)] == [128173238136, 80800508052, 809838319232]

"""A shuffle that is a function: where document i of an epoch lies, without a list of all of them.

A Feistel network (Luby and Rackoff, 1988) on the smallest rectangle of numbers that holds the source, walked until
it lands inside. It takes a few microseconds whatever the length, no memory, and integers only, so that the order
of a run does not hang on the version of any library.
"""

import functools
import math

from tpu_llm.data.mixture import uint64

_ROUNDS = 6  # with 4, permutations of six documents are visibly not equally likely; with 6 they are
_64 = (1 << 64) - 1


class Shuffle:
    """Endless: `shuffle[i]` is in `range(length)`, and each epoch of `length` numbers is another permutation of it."""

    def __init__(self, length: int, *seed: object):
        self._length, self._seed = length, seed
        self._columns = math.isqrt(length - 1) + 1
        self._rows = -(-length // self._columns)

    def __getitem__(self, index: int) -> int:
        epoch, number = divmod(index, self._length)
        keys = _keys(self._seed, epoch)
        while True:
            row, column = divmod(number, self._columns)
            for i in range(0, 2 * _ROUNDS, 2):
                row = (row + _mix(column ^ keys[i])) % self._rows
                column = (column + _mix(row ^ keys[i + 1])) % self._columns
            number = row * self._columns + column
            if number < self._length:
                return number


@functools.lru_cache(256)
def _keys(seed: tuple[object, ...], epoch: int) -> list[int]:
    return [uint64(*seed, epoch, i) for i in range(2 * _ROUNDS)]


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of 64 depends on all."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)

"""Which windows of some texts occur in others that stream by: runs of n words, or of n characters, equal in all.

Memory is that of the texts that are looked for. Of what streams by every window is hashed, at the speed of NumPy, and
what has a known hash is compared as text, so a hit is never a collision.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

Unit = Literal['words', 'characters']

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_BLOCK = 1 << 18  # units that are hashed at once
_FILTER_BITS = 22  # of a hash, in a table that turns away most of what is not looked for


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A window that was looked for and found."""

    window: int  # its number
    text: str


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r'\w+', text.lower())


def characters(text: str) -> str:
    """Letters and digits alone, in lower case: neither spaces nor punctuation tell two texts apart."""
    return re.sub(r'[\W_]+', '', text.lower())


class Windows:
    """All windows of `size` units of some texts, numbered, equal ones once. `owners[w]`: the texts with window w."""

    def __init__(self, texts: Sequence[str], unit: Unit, size: int):
        self.unit: Unit = unit
        self.size = size
        self._split = words if unit == 'words' else characters
        self._units = [self._split(text) for text in texts]
        vocabulary = sorted({word for each in self._units for word in each}) if unit == 'words' else []
        self._ids = {word: at for at, word in enumerate(vocabulary, 1)}
        hashes = [self._hashes(each) for each in self._units]
        owner = np.repeat(np.arange(len(texts)), [len(each) for each in hashes])
        place = np.concatenate([np.arange(len(each)) for each in hashes]) if hashes else np.zeros(0, np.int64)
        joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        self._keys, first, window = np.unique(joined, return_index=True, return_inverse=True)
        self._first = [(int(owner[at]), int(place[at])) for at in first]
        self.owners: list[list[int]] = [[] for _ in self._keys]
        for at, text in sorted(set(zip(window.tolist(), owner.tolist(), strict=True))):
            self.owners[at].append(text)
        self._known = np.zeros(1 << _FILTER_BITS, bool)
        self._known[self._keys >> np.uint64(64 - _FILTER_BITS)] = True

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, text: str) -> Iterator[Hit]:
        """The windows that occur in a text, each as often as it does."""
        units = self._split(text)
        for start in range(0, len(units) - self.size + 1, _BLOCK):
            block = units[start : start + _BLOCK + self.size - 1]
            hashes = self._hashes(block)
            for at in np.flatnonzero(self._known[hashes >> np.uint64(64 - _FILTER_BITS)]):
                window = int(np.searchsorted(self._keys, hashes[at]))
                if window < len(self._keys) and self._keys[window] == hashes[at]:
                    owner, place = self._first[window]
                    found = block[at : at + self.size]
                    if found == self._units[owner][place : place + self.size]:
                        yield Hit(window, found if isinstance(found, str) else ' '.join(found))

    def _hashes(self, units: Sequence[str]) -> np.ndarray:
        """uint64 of each window: Σ unit[i + k] · BASE^k modulo 2^64, as a difference of running sums."""
        count = len(units) - self.size + 1
        if count < 1:
            return np.zeros(0, np.uint64)
        if isinstance(units, str):
            ids = np.frombuffer(units.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.uint64)
        else:
            ids = np.fromiter((self._ids.get(word, 0) for word in units), np.uint64, len(units))
        powers = np.cumprod(np.full(len(units), _BASE, np.uint64))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(ids) * powers)])
        inverse = np.cumprod(np.full(count, _INVERSE, np.uint64))
        return _mixed((sums[self.size :] - sums[: -self.size]) * inverse)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern (the end of splitmix64: Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

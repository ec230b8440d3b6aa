"""How another library lays a tensor out, in the letters of ours.

`'(NH)D'` is a matrix whose rows are heads and their widths, flattened, and whose columns are the model's width. Beside
our `'DNH'` it says all that a reshape and a transpose must do, both ways and bit for bit:

- a plus marks where several of ours are joined into one of theirs: query, key and value one after the other along the
  rows are `'(+NH)D'`, `'(+KH)D'`, `'(+KH)D'`; side by side within each head, `'(N+H)D'` each;
- `h` and `j` are H and J with interleaved rotary pairs, (0, 1), (2, 3)…, where ours are (0, r/2), (1, r/2 + 1)…;
- `1` is a dim of size one that ours lacks;
- `K` and `G` stand for the N = K x G query heads where a group shares a key.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_GROUP = re.compile(r'\(([^)]*)\)|(.)')


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One tensor of ours within one of theirs."""

    theirs: str
    ours: str
    sizes: Mapping[str, int]  # of every letter of ours
    rotary: int = 0  # how many of a head's numbers turn

    @property
    def groups(self) -> list[tuple[str, str | None]]:
        """For each dim of theirs its letters before and behind the plus; None where there is no plus."""
        texts = [inside or alone for inside, alone in _GROUP.findall(self.theirs)]
        return [tuple(text.split('+')) if '+' in text else (text, None) for text in texts]  # pyright: ignore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in self.ours)

    @property
    def letters(self) -> str:
        return re.sub(r'[()+1]', '', self.theirs)

    @property
    def spelled(self) -> str:
        """Our dims, with N as K and G where theirs says so."""
        return self.ours.replace('N', 'KG') if 'G' in self.letters else self.ours

    def size(self, letters: str) -> int:
        return math.prod(self._size(letter) for letter in letters)

    def _size(self, letter: str) -> int:
        if letter == '1':
            return 1
        if letter == 'G':
            return self.sizes['N'] // self.sizes['K']
        return self.sizes[letter.upper()]

    def from_theirs(self, array: np.ndarray) -> np.ndarray:
        """Ours of an array that holds nothing else; a view unless pairs are interleaved."""
        letters = self.letters
        array = array.reshape([self._size(letter) for letter in letters])
        for axis, letter in enumerate(letters):
            if letter in 'hj':
                array = np.take(array, _halves(array.shape[axis], self.rotary), axis)
        order = [letters.upper().index(letter) for letter in self.spelled]
        return array.transpose(order).reshape(self.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_theirs`, one dim for each of its letters."""
        letters = self.letters
        array = array.reshape([self._size(letter) for letter in self.spelled])
        array = array.transpose([self.spelled.index(letter) for letter in letters.upper()])
        for axis, letter in enumerate(letters):
            if letter in 'hj':
                array = np.take(array, np.argsort(_halves(array.shape[axis], self.rotary)), axis)
        return array


def fits(theirs: str, ours: str) -> bool:
    """Whether a layout is one of a tensor with these dims: it has their letters."""
    letters = re.sub(r'[()+1]', '', theirs).upper()
    return sorted(letters) == sorted(ours.replace('N', 'KG') if 'G' in letters else ours)


def shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """Of the one tensor of theirs that holds the parts."""
    dims = []
    for at, (before, after) in enumerate(parts[0].groups):
        joined = 1 if after is None else sum(part.size(part.groups[at][1] or '') for part in parts)
        dims.append(parts[0].size(before) * joined)
    return tuple(dims)


def split(array: np.ndarray, parts: Sequence[Part]) -> list[np.ndarray]:
    """Theirs as ours, one a part; views wherever that can be."""
    at = _plus(parts)
    if at is None:
        return [parts[0].from_theirs(array)]
    before = parts[0].size(parts[0].groups[at][0])
    apart = array.reshape(*array.shape[:at], before, -1, *array.shape[at + 1 :])
    widths = [part.size(part.groups[at][1] or '') for part in parts]
    cuts = np.split(apart, np.cumsum(widths)[:-1], axis=at + 1)
    return [part.from_theirs(cut) for part, cut in zip(parts, cuts, strict=True)]


def join(arrays: Sequence[np.ndarray], parts: Sequence[Part]) -> np.ndarray:
    """Ours as theirs."""
    at = _plus(parts)
    theirs = [part.to_theirs(array) for part, array in zip(parts, arrays, strict=True)]
    if at is None:
        return theirs[0].reshape(shape(parts))
    apart = []
    for part, array in zip(parts, theirs, strict=True):
        dims = [part.size(before + (after or '')) for before, after in part.groups]
        before, after = part.groups[at]
        apart.append(array.reshape(*dims[:at], part.size(before), part.size(after or ''), *dims[at + 1 :]))
    return np.concatenate(apart, axis=at + 1).reshape(shape(parts))


def _plus(parts: Sequence[Part]) -> int | None:
    places = {at for part in parts for at, (_, after) in enumerate(part.groups) if after is not None}
    assert len(places) == (len(parts) > 1), f'{[part.theirs for part in parts]}: parts are joined along one dim'
    return places.pop() if places else None


def _halves(width: int, rotary: int) -> np.ndarray:
    """Where each of ours stands among interleaved pairs; what does not turn stays."""
    rotary = rotary or width
    return np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, width)])

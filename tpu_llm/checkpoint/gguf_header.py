"""The header of a GGUF file, both ways: counts, typed metadata and the table of tensors.

A count or a length is checked against what is left of the file before anything is made for it: what a file cannot
hold is never allocated.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tpu_llm.checkpoint.weight_file import MAX_HEADER_BYTES, FileError, WeightFile, show

MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NESTING = 4
_LENGTH = struct.Struct('<Q')
_FIRST_BYTES = 1 << 22  # most headers are smaller, vocabulary and all

# Types of values, by their number in the file.
_DTYPES = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 10: '<u8', 11: '<i8', 12: '<f8'}
_NUMBERS = {kind: np.dtype(name) for kind, name in _DTYPES.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KIND_OF = {dtype: kind for kind, dtype in _NUMBERS.items()} | {np.dtype(bool): _BOOL}


class Header:
    """Reads forward through the header; what it is about to read must be there before it makes room for it."""

    def __init__(self, file: WeightFile):
        self.file, self.at, self.where = file, 0, 'the header'
        self.seen = memoryview(b'')
        self.limit = min(file.size, MAX_HEADER_BYTES)

    def preamble(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata pairs."""
        if bytes(self.take(min(4, self.limit))) != b'GGUF':
            raise self.file.error('it is not a GGUF file: it does not begin with GGUF')
        (version,) = self.unpack('<I')
        if version and version & 0xFFFF == 0:
            raise self.file.error('it is big-endian GGUF; convert it with gguf-convert-endian (pip install gguf)')
        if version not in (2, 3):
            raise self.file.error(f'its GGUF version is {version}; versions 2 and 3 are read: convert the model again')
        tensors, pairs = self.unpack('<QQ')
        return version, tensors, pairs

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        self.expect(count, 13, 'metadata pairs')
        keys = set()
        for index in range(count):
            self.where = f'metadata pair {index}'
            key = self.string()
            self.where = f'metadata {show(key)}'
            if key in keys:
                raise self.error('it is there twice')
            keys.add(key)
            (kind,) = self.unpack('<I')
            yield key, self.value(kind)

    def entries(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, dims, number of the type, and offset of every tensor."""
        self.where = 'the table of tensors'
        self.expect(count, 24, 'tensors')
        names = set()
        for index in range(count):
            self.where = f'tensor {index}'
            name = self.string()
            self.where = f'tensor {show(name)}'
            if name in names:
                raise self.error('it is there twice')
            names.add(name)
            (rank,) = self.unpack('<I')
            if rank > MAX_DIMS:
                raise self.error(f'it has {rank} dims, and GGUF at most {MAX_DIMS}')
            dims = self.unpack(f'<{rank}Q')
            kind, offset = self.unpack('<IQ')
            yield name, dims, kind, offset

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.numbers(kind, 1).item()
        if kind == _BOOL:
            return bool(self.booleans(1)[0])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            item, count = self.unpack('<IQ')
            return self.array(item, count, nesting)
        if kind == _ARRAY:
            raise self.error(f'arrays are nested more than {_MAX_NESTING} deep')
        raise self.error(f'{kind} is no type of value')

    def array(self, kind: int, count: int, nesting: int) -> Any:
        if kind in _NUMBERS:
            return self.numbers(kind, count)
        if kind == _BOOL:
            return self.booleans(count)
        if kind == _STRING:
            return self.strings(count)
        self.expect(count, 12, 'arrays')
        if kind != _ARRAY:
            raise self.error(f'{kind} is no type of value')
        return [self.value(kind, nesting + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = _NUMBERS[kind]
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).copy()

    def booleans(self, count: int) -> np.ndarray:
        data = np.frombuffer(self.take(count), np.uint8)
        if (data > 1).any():
            raise self.error('a boolean is neither 0 nor 1')
        return data.astype(bool)

    def string(self) -> str:
        (size,) = self.unpack('<Q')
        try:
            return str(self.take(size), 'utf-8')
        except UnicodeDecodeError:
            raise self.error('it holds text that is not UTF-8') from None

    def strings(self, count: int) -> list[str]:
        self.expect(count, 8, 'strings')
        found, seen = [], self.seen
        try:
            for _ in range(count):  # A vocabulary has a hundred thousand: no call for each.
                start = self.at + 8
                if start <= len(seen) and (stop := start + _LENGTH.unpack_from(seen, self.at)[0]) <= len(seen):
                    found.append(str(seen[start:stop], 'utf-8'))
                    self.at = stop
                else:  # The end of what was fetched so far, or of the file.
                    found.append(self.string())
                    seen = self.seen
        except UnicodeDecodeError:
            raise self.error('it holds text that is not UTF-8') from None
        return found

    def unpack(self, pattern: str) -> tuple[int, ...]:
        return struct.unpack(pattern, self.take(struct.calcsize(pattern)))

    def expect(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count of things that the rest of the file cannot hold."""
        if count * least_bytes > self.limit - self.at:
            raise self.error(f'it announces {count} {what}, more than the file holds')

    def take(self, count: int) -> memoryview:
        start, stop = self.at, self.at + count
        if stop > self.limit:
            whole = 'a header has at most' if self.limit == MAX_HEADER_BYTES else 'the file has'
            raise self.error(f'it ends at byte {stop}, and {whole} {self.limit}; the file is cut short or damaged')
        if stop > len(self.seen):
            fetched = self.file.read(0, min(self.limit, max(stop, 2 * len(self.seen), _FIRST_BYTES)))
            self.seen = fetched.data
        self.at = stop
        return self.seen[start:stop]

    def error(self, fault: str) -> FileError:
        return self.file.error(f'{self.where}: {fault}')


# ---------------------------------------------------------------------------------------------------- pack


def text(value: str) -> bytes:
    """A string of a file: its length in bytes, then the bytes."""
    data = value.encode()
    return struct.pack('<Q', len(data)) + data


def pack(value: Any) -> tuple[int, bytes]:
    """Number of the type, and the bytes of a value. Raises ValueError, OverflowError or struct.error if it has none."""
    if isinstance(value, str):
        return _STRING, text(value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        kind, data = _pack_numbers(value)
        return _ARRAY, struct.pack('<IQ', kind, len(value)) + data
    if isinstance(value, (list, tuple)):
        kind, data = _pack_list(value)
        return _ARRAY, struct.pack('<IQ', kind, len(value)) + data
    if isinstance(value, np.generic):
        return _pack_numbers(np.asarray(value))
    if isinstance(value, float):
        return _KIND_OF[np.dtype('<f4')], struct.pack('<f', value)
    if isinstance(value, bool):
        return _BOOL, bytes([value])
    if isinstance(value, int):
        for kind in ('<u4', '<i4', '<u8', '<i8'):
            if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                return _pack_numbers(np.asarray(value, kind))
        raise ValueError(f'{value} has more than 64 bits')
    raise ValueError(f'{type(value).__name__} is no type of GGUF')


def _pack_numbers(numbers: np.ndarray) -> tuple[int, bytes]:
    if numbers.dtype not in _KIND_OF:
        raise ValueError(f'{numbers.dtype} is no type of GGUF')
    return _KIND_OF[numbers.dtype], numbers.tobytes()


def _pack_list(values: Sequence[Any]) -> tuple[int, bytes]:
    """The type of all the values, and their bytes; an empty list is one of strings, as numbers come in arrays."""
    types = {type(value) for value in values}
    if types <= {str}:
        return _STRING, b''.join(map(text, values))
    if types == {bool}:
        return _BOOL, bytes(values)
    if types == {int}:
        return _KIND_OF[np.dtype('<i4')], struct.pack(f'<{len(values)}i', *values)
    if types == {float}:
        return _KIND_OF[np.dtype('<f4')], struct.pack(f'<{len(values)}f', *values)
    if types <= {list, tuple, np.ndarray}:
        packed = [pack(value) for value in values]
        return _ARRAY, b''.join(data for _, data in packed)
    raise ValueError(f'a list of {" and ".join(sorted(kind.__name__ for kind in types))} is no type of GGUF')

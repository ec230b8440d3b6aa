"""GGUF, llama.cpp's format: metadata, a table of tensors, their blocks; read by tensor and by slice, and written.

Layout (ggml's docs/gguf.md), all little-endian: `GGUF`, version uint32 (2 or 3), tensor count and metadata count
uint64; each key a string with a type and a value; each tensor a string, its dims, fastest first, its type and its
offset from the start of the data, which is aligned (32 bytes, or `general.alignment`). A string is a uint64 length
and UTF-8. Here shapes are in NumPy's order, slowest first.
"""

import dataclasses
import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.checkpoint import weight_file
from tpu_llm.checkpoint.gguf_header import MAX_DIMS, Header, pack, text
from tpu_llm.checkpoint.weight_file import FileError, Slices, WeightFile, show
from tpu_llm.config import ConfigError, nearest
from tpu_llm.quant import ggml

ALIGNMENT = 32
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less its zero


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """A tensor's type (`'Q4_K'`; `'type 57'` where we have no name), shape, and place in the file in bytes."""

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int  # start, where the type's size is unknown


class Reader:
    """A GGUF file whose header is read and checked; tensors are read when asked for.

    `metadata` has Python numbers, booleans and strings; an array is a NumPy array of the file's type, or a list where
    it is one of strings or of arrays. `tensors` has an Info a name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Info]

    def __init__(self, path: epath.PathLike):
        """Raises FileError where the file is not whole, sound GGUF."""
        self._file = WeightFile(path)
        header = Header(self._file)
        self.version, tensors, pairs = header.preamble()
        self.metadata = dict(header.pairs(pairs))
        entries = list(header.entries(tensors))
        alignment = self.metadata.get('general.alignment', ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._file.error(f'general.alignment is {alignment!r}, not a power of two')
        data = -(-header.at // alignment) * alignment
        self.tensors = dict(self._place(*entry, data, alignment) for entry in entries)
        self._check_apart()

    @property
    def path(self) -> epath.Path:
        return self._file.path

    def read(self, name: str, slices: Slices = None) -> np.ndarray:
        """A tensor, or a slice of it along each dim, as float32.

        Blocks outside the slice are not decoded, nor rows outside that of the first dim read. Raises ConfigError on
        a name that is not there, FileError on a type that we do not decode.
        """
        info = self._info(name)
        if info.type not in ggml.FORMATS or not ggml.FORMATS[info.type].decodes:
            known = ', '.join(kind.name for kind in ggml.FORMATS.values() if kind.decodes)
            raise self._error(name, f'its type is {info.type}; we decode {known}: convert the file to one of these')
        kind, cuts = ggml.FORMATS[info.type], weight_file.bounds(slices, info.shape)
        if not info.shape:
            return ggml.decode(kind.name, self.raw(name)[0]).reshape(())
        *rows, (start, stop) = cuts
        first, last = start // kind.block_values, -(-stop // kind.block_values)
        blocks = self._blocks(info, kind, rows)[..., first * kind.block_bytes : last * kind.block_bytes]
        values = ggml.decode(kind.name, blocks)
        return values[..., start - first * kind.block_values : stop - first * kind.block_values]

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as they are, uint8 [rows, bytes of a row]; a row is one along the last dim."""
        info = self._info(name)
        if info.type not in ggml.FORMATS:
            raise self._error(name, f'its type is {info.type}, whose size we do not know')
        kind, rows = ggml.FORMATS[info.type], math.prod(info.shape[:-1])
        return self._file.read(info.start, info.stop).reshape(rows, kind.row_bytes(_row(info.shape)))

    def _blocks(self, info: Info, kind: ggml.Format, rows: Sequence[tuple[int, int]]) -> np.ndarray:
        """Bytes [*rows, bytes of a row]; of the file, only those of the slice of the first dim are read."""
        row_bytes = kind.row_bytes(_row(info.shape))
        if not rows:
            return self._file.read(info.start, info.stop)
        (begin, end), *inner = rows
        stride = math.prod(info.shape[1:-1]) * row_bytes
        data = self._file.read(info.start + begin * stride, info.start + end * stride)
        return data.reshape(end - begin, *info.shape[1:-1], row_bytes)[:, *(slice(*cut) for cut in inner)]

    def _info(self, name: str) -> Info:
        if name not in self.tensors:
            raise ConfigError(f'{self.path} has no tensor {show(name)}{nearest(name, self.tensors)}')
        return self.tensors[name]

    def _error(self, name: str, fault: str) -> FileError:
        return self._file.error(f'tensor {show(name)}: {fault}')

    # -------------------------------------------------------------------------------------------- checks

    def _place(
        self, name: str, dims: tuple[int, ...], number: int, offset: int, data: int, alignment: int
    ) -> tuple[str, Info]:
        shape = dims[::-1]
        if weight_file.overflows(shape, 8):
            raise self._error(name, f'its shape {shape} is larger than any memory')
        if offset % alignment:
            raise self._error(name, f'its offset {offset} is not a multiple of {alignment}')
        kind, start, size = _BY_NUMBER.get(number), data + offset, 0
        if kind is not None:
            try:
                size = math.prod(shape[:-1]) * kind.row_bytes(_row(shape))
            except ValueError as error:
                raise self._error(name, str(error)) from None
        if start + size > self._file.size:
            raise self._error(
                name, f'it ends at byte {start + size} of a file of {self._file.size}; the file is cut short or damaged'
            )
        return name, Info(kind.name if kind else f'type {number}', shape, start, start + size)

    def _check_apart(self) -> None:
        placed = sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop))
        for (before, one), (name, other) in itertools.pairwise(placed):
            if other.start < one.stop:
                raise self._error(name, f'it overlaps {show(before)}')


def _row(shape: Sequence[int]) -> int:
    """Values in a row: along the last dim."""
    return shape[-1] if shape else 1


_BY_NUMBER = {kind.number: kind for kind in ggml.FORMATS.values()}


# --------------------------------------------------------------------------------------------------- write


def write(
    path: epath.PathLike,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    data: Callable[[str], Any],
) -> None:
    """Writes GGUF 3, local or gs://: tensors are (name, type, shape), and `data(name)` gives each in its turn.

    Types: F32, F16, BF16, Q8_0, Q4_0, Q4_1. An int is written as uint32 where it fits, a float as float32, and in a
    list int32 and float32, as llama.cpp reads them; a NumPy number or array as its own type. Raises ConfigError on what
    cannot be written, and leaves no file then.
    """
    header, sizes = _header(path, metadata, tensors)
    with weight_file.create(path) as append:
        append(header)
        for name, kind, shape in tensors:
            values = np.asarray(data(name))
            if values.shape != tuple(shape):
                raise ValueError(f'tensor {show(name)} is {values.shape}, and {tuple(shape)} was announced')
            try:
                blocks = ggml.encode(kind, np.atleast_1d(values.astype(np.float32, copy=False)))
            except ValueError as error:
                raise ConfigError(f'{path}: tensor {show(name)} cannot be written as {kind}: {error}') from None
            assert blocks.nbytes == sizes[name]
            append(blocks)
            append(bytes(-blocks.nbytes % ALIGNMENT))


def _header(
    path: epath.PathLike, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, str, Sequence[int]]]
) -> tuple[bytes, dict[str, int]]:
    """The header, padded, and the bytes of every tensor."""
    if metadata.get('general.alignment', ALIGNMENT) != ALIGNMENT:
        raise ConfigError(
            f'{path}: general.alignment is {metadata["general.alignment"]}; we write {ALIGNMENT}: leave it out'
        )
    parts = [b'GGUF', struct.pack('<IQQ', 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            kind, packed = pack(value)
            parts += [text(key), struct.pack('<I', kind), packed]
        except (ValueError, OverflowError, struct.error) as error:
            raise ConfigError(f'{path}: metadata {show(key)} cannot be written: {error}') from None
    offset, sizes = 0, {}
    for name, kind, shape in tensors:
        try:
            if name in sizes:
                raise ValueError('it is there twice')
            form = _check_writable(name, kind, shape)
            sizes[name] = math.prod(shape[:-1]) * form.row_bytes(_row(shape))
        except ValueError as error:
            raise ConfigError(f'{path}: tensor {show(name)} cannot be written: {error}') from None
        parts += [text(name), struct.pack(f'<I{len(shape)}QIQ', len(shape), *reversed(shape), form.number, offset)]
        offset += sizes[name] + -sizes[name] % ALIGNMENT
    header = b''.join(parts)
    return header + bytes(-len(header) % ALIGNMENT), sizes


def _check_writable(name: str, kind: str, shape: Sequence[int]) -> ggml.Format:
    form = ggml.FORMATS.get(kind)
    if form is None or not form.encodes:
        known = ', '.join(form.name for form in ggml.FORMATS.values() if form.encodes)
        raise ValueError(f'{kind} is not among {known}')
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f'its name is longer than {_MAX_NAME_BYTES} bytes')
    if len(shape) > MAX_DIMS:
        raise ValueError(f'it has {len(shape)} dims, and GGUF at most {MAX_DIMS}')
    return form

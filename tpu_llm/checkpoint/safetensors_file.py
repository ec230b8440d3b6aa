"""safetensors, Hugging Face's format: a JSON table of tensors, their bytes; read by tensor and by slice, and written.

Layout (github.com/huggingface/safetensors): the header's length, uint64 little-endian; the header, a JSON object of
`{name: {dtype, shape, data_offsets}}` with strings under `__metadata__`; then the data, row-major and little-endian,
which the tensors cover without a gap or an overlap.
"""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from tpu_llm.checkpoint import files, weight_file
from tpu_llm.checkpoint.weight_file import MAX_HEADER_BYTES, FileError, Slices, WeightFile, show
from tpu_llm.config import ConfigError, nearest

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_PICKLED = ('.bin', '.pt', '.pth', '.ckpt')

DTYPES = {
    'BOOL': np.dtype(bool),
    **{f'I{bits}': np.dtype(f'<i{bits // 8}') for bits in (8, 16, 32, 64)},
    **{f'U{bits}': np.dtype(f'<u{bits // 8}') for bits in (8, 16, 32, 64)},
    **{f'F{bits}': np.dtype(f'<f{bits // 8}') for bits in (16, 32, 64)},
    'C64': np.dtype('<c8'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
    'F8_E4M3FNUZ': np.dtype(ml_dtypes.float8_e4m3fnuz),
    'F8_E5M2FNUZ': np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """A tensor's dtype, shape, and place in the file in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Reader:
    """A safetensors file whose header is read and checked; tensors are read when asked for.

    `tensors` has an Info a name, in the file's order; `metadata` strings.
    """

    tensors: dict[str, Info]
    metadata: dict[str, str]

    def __init__(self, path: epath.PathLike):
        """Raises FileError where the file is not whole, sound safetensors."""
        self._file = WeightFile(path)
        header, data = self._header()
        self.metadata = self._strings(header.pop('__metadata__', {}))
        self.tensors = {name: self._info(name, entry, data) for name, entry in header.items()}
        self._check_cover(data)

    @property
    def path(self) -> epath.Path:
        return self._file.path

    def read(self, name: str, slices: Slices = None) -> np.ndarray:
        """A tensor, or a slice of it along each dim, read-only.

        Of a local file it is a view where the file aligns it; of a remote one, only rows in the slice of the first
        dim are fetched. Raises ConfigError on a name that is not there.
        """
        if name not in self.tensors:
            raise ConfigError(f'{self.path} has no tensor {show(name)}{nearest(name, self.tensors)}')
        info = self.tensors[name]
        cuts = weight_file.bounds(slices, info.shape)
        begin, end = cuts[0] if cuts else (0, 1)
        stride = math.prod(info.shape[1:]) * info.dtype.itemsize
        data = self._file.read(info.start + begin * stride, info.start + end * stride)
        if info.dtype == bool and (data > 1).any():
            raise self._error(name, 'a boolean is neither 0 nor 1')
        rows = np.require(data.view(info.dtype), requirements='A')
        shape = (end - begin, *info.shape[1:]) if cuts else ()
        return rows.reshape(shape)[:, *(slice(*cut) for cut in cuts[1:])] if cuts else rows.reshape(shape)

    # -------------------------------------------------------------------------------------------- checks

    def _header(self) -> tuple[dict[str, Any], int]:
        """The JSON object, and where the data begins."""
        size = self._file.size
        if size < 8:
            raise self._file.error(f'it has {size} bytes, too few for a safetensors file')
        (length,) = struct.unpack('<Q', self._file.read(0, 8).tobytes())
        if length > MAX_HEADER_BYTES:
            raise self._file.error(
                f'its header has {length} bytes, more than {MAX_HEADER_BYTES}; it is not safetensors'
            )
        if 8 + length > size:
            raise self._file.error(f'its header has {length} bytes, and the file {size}; it is cut short')
        return _json_object(self._file, self._file.read(8, 8 + length).tobytes(), 'its header'), 8 + length

    def _strings(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(_is_text(value) for value in metadata.values()):
            raise self._file.error('its __metadata__ is not an object of strings')
        return metadata

    def _info(self, name: str, entry: Any, data: int) -> Info:
        if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
            raise self._error(name, 'it is not described by dtype, shape and data_offsets')
        dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
        if not isinstance(dtype, str) or dtype not in DTYPES:
            given = show(dtype) if isinstance(dtype, str) else 'no string'
            raise self._error(name, f'its dtype is {given}; known are {", ".join(DTYPES)}')
        if not _are_sizes(shape) or weight_file.overflows(shape, DTYPES[dtype].itemsize):
            raise self._error(name, 'its shape is not a list of sizes that a memory could hold')
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(name, 'its data_offsets are not a start and a stop')
        start, stop = offsets
        if data + stop > self._file.size:
            raise self._error(
                name, f'it ends at byte {data + stop} of a file of {self._file.size}; the file is cut short or damaged'
            )
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if stop - start != needed:
            raise self._error(name, f'it has {stop - start} bytes, and {dtype} of shape {shape} needs {needed}')
        return Info(DTYPES[dtype], tuple(shape), data + start, data + stop)

    def _check_cover(self, data: int) -> None:
        at = data
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != at:
                fault = (
                    'overlaps another' if info.start < at else f'begins {info.start - at} bytes after the one before'
                )
                raise self._error(name, f'it {fault}')
            at = info.stop
        if at != self._file.size:
            raise self._file.error(f'{self._file.size - at} bytes at its end belong to no tensor; it is damaged')

    def _error(self, name: str, fault: str) -> FileError:
        return self._file.error(f'tensor {show(name)}: {fault}')


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _is_text(value: Any) -> bool:
    """Whether it is a string of whole characters; JSON's \\ud800 is half of one."""
    return isinstance(value, str) and not re.search('[\ud800-\udfff]', value)


def _json_object(file: WeightFile, data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name is twice and no number is NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = {}
        for name, value in pairs:
            if name in found or not _is_text(name):
                raise ValueError(f'the name {show(name)} is {"there twice" if name in found else "no text"}')
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f'{constant} is no JSON')

    try:
        found = json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise file.error(f'{what} is nested too deep') from None
    except ValueError as error:
        raise file.error(f'{what} is not JSON: {files.one_line(error)}') from None
    if not isinstance(found, dict):
        raise file.error(f'{what} is not a JSON object')
    return found


# -------------------------------------------------------------------------------------------------- folder


def open_folder(folder: epath.PathLike) -> dict[str, Reader]:
    """The reader of each tensor in `model.safetensors`, or in the shards that `model.safetensors.index.json` lists.

    Raises FileError where a shard is missing or is not as the index says, and where there are only pickles.
    """
    folder = epath.Path(folder)
    names = files.listing(folder)
    if WHOLE in names:
        reader = Reader(folder / WHOLE)
        return dict.fromkeys(reader.tensors, reader)
    if INDEX in names:
        return _open_shards(folder, names)
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise FileError(
            f'{folder}: {pickled[0]} is a pickle, which runs code when it is read, so it is refused; convert it, '
            "where you trust it, with transformers' save_pretrained(safe_serialization=True)"
        )
    there = f'; there are {", ".join(names[:8])}' if names else ''
    raise FileError(f'{folder} has neither {WHOLE} nor {INDEX}{there}')


def _open_shards(folder: epath.Path, names: Sequence[str]) -> dict[str, Reader]:
    index = WeightFile(folder / INDEX)
    if index.size > MAX_HEADER_BYTES:
        raise index.error(f'it has {index.size} bytes, more than {MAX_HEADER_BYTES}')
    places = _json_object(index, index.read(0, index.size).tobytes(), 'the index').get('weight_map')
    if not isinstance(places, dict) or not all(_is_text(place) for place in places.values()):
        raise index.error('its weight_map does not give the file of each tensor')
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if shard not in names]:  # names of this folder only: no path leads out
        raise index.error(f'{len(missing)} of {len(shards)} files are missing: {", ".join(map(show, missing[:4]))}')
    readers = {shard: Reader(folder / shard) for shard in shards}
    problems = [
        f'{show(name)} is not in {places[name]}' for name in places if name not in readers[places[name]].tensors
    ]
    for shard, reader in readers.items():
        problems += [f'{show(name)} is in {shard}' for name in reader.tensors if places.get(name) != shard]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise index.error(f'it is not of these files: {"; ".join(problems[:3])}{more}')
    return {name: readers[place] for name, place in places.items()}


# --------------------------------------------------------------------------------------------------- write


def write(
    path: epath.PathLike,
    tensors: Iterable[tuple[str, Any, Sequence[int]]],
    data: Callable[[str], Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, local or gs://: tensors are (name, dtype, shape), and `data(name)` gives each in its turn.

    Wider dtypes come first, so that every tensor is aligned. Raises ConfigError, before anything is written, on a
    name that is there twice and on a dtype that safetensors has not.
    """
    header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
    listed = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
    listed.sort(key=lambda tensor: -tensor[1].itemsize)
    at = 0
    for name, dtype, shape in listed:
        if name in header or name == '__metadata__' or not _is_text(name) or dtype not in _NAMES:
            fault = f'safetensors has no {dtype}' if dtype not in _NAMES else 'the name is there twice, or no name'
            raise ConfigError(f'{path}: tensor {show(name)} cannot be written: {fault}')
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': _NAMES[dtype], 'shape': shape, 'data_offsets': (at, stop)}
        at = stop
    packed = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
    packed += b' ' * (-len(packed) % 8)
    with weight_file.create(path) as append:
        append(struct.pack('<Q', len(packed)) + packed)
        for name, dtype, shape in listed:
            values = np.asarray(data(name))
            if (values.dtype, values.shape) != (dtype, shape):
                given = f'{values.dtype}{list(values.shape)}'
                raise ValueError(f'tensor {show(name)} is {given}, and {dtype}{list(shape)} was announced')
            append(values)

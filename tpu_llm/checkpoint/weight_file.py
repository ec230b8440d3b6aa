"""What the readers and writers of others' weights share: a file's bytes by range, local or gs://, and its errors.

Such files come from anywhere. Nothing is believed before it is checked against the size of the file, and a file
that is not what it says is refused in one line.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.checkpoint import files
from tpu_llm.config import ConfigError

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
MAX_DIMS = 32
_PIECE_BYTES = 1 << 24

Slices = Sequence[slice] | None


class FileError(ConfigError):
    """A file of weights is not what it says; the message is one line that names the file, the tensor and the fault."""


class WeightFile:
    """The bytes of a file, read by range: of a local one through the page cache without a copy, else by request."""

    def __init__(self, path: epath.PathLike):
        """Raises FileError where there is no such file, or where it only stands for one."""
        self.path = epath.Path(path)
        if not files.exists(self.path) or self.path.is_dir():
            raise FileError(f'{self.path} is not a file')
        cloud = files.is_cloud(self.path)
        self.size = self.path.stat().length if cloud else os.path.getsize(self.path)
        self._local = not cloud
        if bytes(self.read(0, min(self.size, 23))) == b'version https://git-lfs':
            raise self.error('it is a pointer of git-lfs, not the file: run git lfs pull')

    def error(self, fault: str) -> FileError:
        return FileError(f'{self.path}: {fault}')

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes start … stop, uint8, read-only; they must lie inside the file."""
        assert 0 <= start <= stop <= self.size, f'{start}…{stop} of {self.size} bytes'
        if start == stop:
            return np.frombuffer(b'', np.uint8)
        if self._local:
            # A map of its own: one of the whole file would keep all that was ever read in this process's memory.
            try:
                return np.memmap(self.path, np.uint8, 'r', offset=start, shape=(stop - start,)).view(np.ndarray)
            except ValueError:  # The map is longer than the file.
                raise self.error(f'byte {stop} is gone; it was cut short while it was read') from None
        from tpu_llm.checkpoint import cloud

        data: Any = cloud.filesystem().cat_file(os.fspath(self.path), start, stop)
        if len(data) != stop - start:
            raise self.error(f'bytes {start} to {stop} came back as {len(data)}; it was replaced while it was read')
        return np.frombuffer(data, np.uint8)


def show(name: str) -> str:
    """A name from a file, for a message: quoted, on one line, and not for ever."""
    return repr(name if len(name) <= 80 else f'{name[:77]}…')


# -------------------------------------------------------------------------------------------------- slices


def bounds(slices: Slices, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop along every dim; dims without a slice are whole. Raises ValueError on steps and on too many."""
    slices = slices or ()
    if len(slices) > len(shape) or any(cut.step not in (None, 1) for cut in slices):
        raise ValueError(f'{tuple(slices)} are not slices without a step of shape {tuple(shape)}')
    whole = [slice(None)] * (len(shape) - len(slices))
    found = [cut.indices(size)[:2] for cut, size in zip([*slices, *whole], shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in found]


def overflows(shape: Sequence[int], item_bytes: int) -> bool:
    """Whether NumPy would refuse such a shape: it counts bytes in 63 bits, and a dim of 0 as 1."""
    count = item_bytes
    for size in shape[:MAX_DIMS]:
        count *= max(size, 1)
    return len(shape) > MAX_DIMS or count >= 1 << 63


# --------------------------------------------------------------------------------------------------- write


@contextlib.contextmanager
def create(path: epath.PathLike) -> Iterator[Callable[[bytes | np.ndarray], None]]:
    """Yields a function that appends bytes; the file appears when the block ends well, and else not at all."""
    path = epath.Path(path)
    if files.is_cloud(path):
        files.exists(path)  # says what to install where gs:// cannot be reached
        from tpu_llm.checkpoint import cloud

        stream: Any = cloud.filesystem().open(os.fspath(path), 'wb', block_size=_PIECE_BYTES)
        try:
            yield lambda data: _append(stream.write, data)
        except BaseException:
            stream.discard()
            stream.closed = True  # or it would be finished, as it is, when it is garbage
            raise
        stream.close()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.parent / f'.{path.name}.{secrets.token_hex(4)}'
    try:
        with open(half, 'wb') as file:
            yield lambda data: _append(file.write, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def _append(write: Callable[[memoryview], object], data: bytes | np.ndarray) -> None:
    """In pieces: gcsfs keeps a copy of what it has not sent."""
    flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1)
    flat = flat.view(np.uint8)
    for start in range(0, len(flat), _PIECE_BYTES):
        write(flat[start : start + _PIECE_BYTES].data)

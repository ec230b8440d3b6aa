"""The few file operations of a workdir, the same on a local disk and on gs://.

A file appears whole or not at all, and a listing is never stale. What is not there is told from what cannot
be read.
"""

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

from etils import epath

from tpu_llm.config import RunError

_CHUNK_BYTES = 1 << 24

logger = logging.getLogger('tpu_llm.checkpoint')


class CheckpointError(RunError):
    """A checkpoint could not be written, read or trusted; the message is one line that says what to do."""


def listing(folder: epath.Path) -> list[str]:
    """Names in a folder, sorted; none where the folder does not exist."""
    if not is_cloud(folder):
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    key = _key(folder)
    found = _cloud().find(key, maxdepth=1, withdirs=True)
    return sorted({name.rstrip('/').rpartition('/')[2] for name in found} - {'', folder.name})


def walk(folder: epath.Path) -> list[str]:
    """Every file below a folder, as sorted paths relative to it."""
    if is_cloud(folder):
        found = _cloud().find(_key(folder))
        return sorted(name.removeprefix(_key(folder) + '/') for name in found if not name.endswith('/'))

    def fail(error: OSError) -> None:
        raise error

    found = os.walk(folder, onerror=fail)
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in found for name in names)


def exists(path: epath.Path) -> bool:
    """Whether there is such a file or folder."""
    return _cloud().exists(_key(path)) if is_cloud(path) else path.exists()


def read(path: epath.Path) -> bytes:
    """Raises FileNotFoundError."""
    return _cloud().cat_file(_key(path)) if is_cloud(path) else path.read_bytes()


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all, whenever this process is killed."""
    if is_cloud(path):  # An object appears when its upload is complete.
        _cloud().pipe_file(_key(path), data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.parent / f'.{path.name}.{secrets.token_hex(4)}'
    try:
        with open(half, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise


def remove(path: epath.Path) -> None:
    """Removes a file or a whole folder; no error where there is none."""
    if is_cloud(path):
        if exists(path):
            _cloud().rm(_key(path), recursive=True)
    elif path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def sha256(path: epath.Path) -> tuple[str, int]:
    """Hex digest and size in bytes. Raises FileNotFoundError."""
    hasher, size = hashlib.sha256(), 0
    for chunk in _chunks(path):
        hasher.update(chunk)
        size += len(chunk)
    return hasher.hexdigest(), size


def _chunks(path: epath.Path) -> Iterator[bytes]:
    if is_cloud(path):
        size = _cloud().info(_key(path))['size']
        for start in range(0, size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)
            yield _cloud().cat_file(_key(path), start, end)
    else:
        with open(path, 'rb') as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


# -------------------------------------------------------------------------------------------------- gs://


def is_cloud(path: epath.Path) -> bool:
    return os.fspath(path).startswith('gs://')


def _key(path: epath.Path) -> str:
    """`bucket/name` of a gs:// path."""
    return os.fspath(path).removeprefix('gs://').rstrip('/')


def _cloud() -> Any:
    try:
        from tpu_llm.checkpoint import cloud
    except ModuleNotFoundError as error:
        raise CheckpointError(f"gs:// paths need {error.name}: pip install -e '.[gcs]'") from None
    return cloud.filesystem()


def one_line(error: BaseException) -> str:
    """What an error says, in one line: the operating system's words, the first line, or the error's type."""
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    if tensorstore := re.search(r"\[os_error_code='?(\d+)", str(error)):  # what stands before it varies
        return os.strerror(int(tensorstore[1]))
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__

"""The few file operations of a workdir, the same on a local disk and on gs://.

A file appears whole or not at all. A listing is never stale: gcsfs caches listings unless told not to, and a
fence read from a cache is no fence. A store that answers "not now" is asked again for a while.
"""

import functools
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

T = TypeVar('T')

PATIENCE_SECONDS = 600.0
_CHUNK_BYTES = 1 << 24

logger = logging.getLogger('tpu_llm.checkpoint')


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or trusted; the message is one line that says what to do."""


def listing(folder: epath.Path) -> list[str]:
    """Names in a folder, sorted; none where the folder does not exist."""
    if not is_cloud(folder):
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    key = _key(folder)
    found = patiently(folder, lambda: _cloud().find(key, maxdepth=1, withdirs=True))
    return sorted({name.rstrip('/').rpartition('/')[2] for name in found} - {'', folder.name})


def walk(folder: epath.Path) -> list[str]:
    """Every file below a folder, as sorted paths relative to it."""
    if is_cloud(folder):
        found = patiently(folder, lambda: _cloud().find(_key(folder)))
        return sorted(name.removeprefix(_key(folder) + '/') for name in found if not name.endswith('/'))
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in paths)


def exists(path: epath.Path) -> bool:
    return patiently(path, lambda: _cloud().exists(_key(path))) if is_cloud(path) else path.exists()


def read(path: epath.Path) -> bytes:
    """Raises FileNotFoundError."""
    return patiently(path, lambda: _cloud().cat_file(_key(path))) if is_cloud(path) else path.read_bytes()


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all, whenever this process is killed."""
    if is_cloud(path):  # An object appears when its upload is complete.
        patiently(path, lambda: _cloud().pipe_file(_key(path), data))
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
            patiently(path, lambda: _cloud().rm(_key(path), recursive=True))
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
        size = patiently(path, lambda: _cloud().info(_key(path))['size'])
        for start in range(0, size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)
            yield patiently(path, lambda start=start, end=end: _cloud().cat_file(_key(path), start, end))
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


@functools.cache
def _cloud() -> Any:
    try:
        import gcsfs
    except ImportError:
        raise CheckpointError("gs:// paths need gcsfs: pip install 'tpu_llm[gcs]'") from None
    # gcsfs logs a traceback for every failure that `patiently` repeats or reports in one line.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    return gcsfs.GCSFileSystem(use_listings_cache=False)


def forget_listings(path: epath.Path) -> None:
    """Makes Orbax, which reads small files through etils' own caching filesystem, look again."""
    if is_cloud(path):
        from etils.epath import backend

        backend.fsspec_backend.fs(path).invalidate_cache()


def patiently(path: epath.Path, request: Callable[[], T]) -> T:
    """The answer of the cloud store, asked again while it is unavailable, for PATIENCE_SECONDS in all.

    gcsfs itself repeats a request for half a minute before it gives up. Raises OSError for what is not there
    or not allowed, CheckpointError where the store stays away or refuses otherwise.
    """
    _cloud()  # Says how to install gcsfs where it is missing.
    import gcsfs.retry

    start, pause = time.monotonic(), 1.0
    while True:
        try:
            return request()
        except OSError:
            raise
        except Exception as error:
            if not gcsfs.retry.is_retriable(error):
                raise CheckpointError(f'{path}: the store refused: {one_line(error)}') from error
            waited = time.monotonic() - start
            if waited > PATIENCE_SECONDS:
                raise CheckpointError(
                    f'{path}: no answer from the store for {waited:.0f} s ({one_line(error)}); '
                    'start again when it is back'
                ) from error
            logger.warning('%s: no answer from the store (%s); asking again', path, one_line(error))
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def one_line(error: BaseException) -> str:
    """What an error says, in one line: the operating system's words, the first line, or the error's type."""
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    if tensorstore := re.search(r': ([^:]+) \[os_error_code=', str(error)):
        return tensorstore[1]
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__

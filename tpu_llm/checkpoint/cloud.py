"""gs:// as a workdir needs it: listings that are never stale, and patience with a store that answers "not now".

Imported only where a path is on gs://. It changes the one gcsfs filesystem that etils holds, since Orbax
writes its small files through that one too.
"""

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import gcsfs.retry
from etils.epath import backend

from tpu_llm.checkpoint.files import CheckpointError, logger, one_line

PATIENCE_SECONDS = 600.0


@functools.cache
def filesystem() -> gcsfs.GCSFileSystem:
    """The filesystem of every gs:// path of this process."""
    found: Any = backend.fsspec_backend.fs('gs://')
    # gcsfs would answer from listings made before another process wrote: a fence read from a cache is no fence.
    found.dircache.use_listings_cache = False
    found.invalidate_cache()
    # It gives up after half a minute, and logs a traceback for what is repeated or reported in one line here.
    found._call = _patient(found._call)
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    return found


def _patient(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The request, repeated while the store is unavailable, for PATIENCE_SECONDS in all."""

    async def called(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        while True:
            try:
                return await call(method, path, *args, **kwargs)
            except Exception as error:
                target = '/'.join(map(str, args)) or path
                if isinstance(error, FileNotFoundError):
                    raise
                if not gcsfs.retry.is_retriable(error):
                    raise CheckpointError(f'gs://{target}: the store refused: {one_line(error)}') from error
                waited = time.monotonic() - start
                if waited > PATIENCE_SECONDS:
                    raise CheckpointError(
                        f'gs://{target}: no answer from the store for {waited:.0f} s ({one_line(error)}); '
                        'start again when it is back'
                    ) from error
                logger.warning('gs://%s: no answer from the store (%s); asking again', target, one_line(error))

    return called

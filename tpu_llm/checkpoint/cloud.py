"""gs:// as a workdir needs it: listings that are never stale, and patience with a store that answers "not now".

Imported only where a path is on gs://. It changes the one gcsfs filesystem that etils holds, since Orbax
writes its small files through that one too.
"""

import functools
import logging
import re
import time
import urllib.parse
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
    """The request, repeated while the store is unavailable, until it has been so for PATIENCE_SECONDS.

    The seconds count from the first request without an answer, whichever it was: what a run that gives up still writes
    does not wait as long again.
    """
    silent_since: float | None = None

    async def called(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal silent_since
        while True:
            start = time.monotonic()
            try:
                answer = await call(method, path, *args, **kwargs)
            except FileNotFoundError:
                silent_since = None
                raise
            except Exception as error:
                place = _place(path, *args)
                if not gcsfs.retry.is_retriable(error):
                    raise CheckpointError(f'{place}: the store refused: {one_line(error)}') from error
                silent_since = silent_since or start
                waited = time.monotonic() - silent_since
                if waited > PATIENCE_SECONDS:
                    raise CheckpointError(
                        f'{place}: no answer from the store for {waited:.0f} s ({one_line(error)}); '
                        'start again when it is back'
                    ) from error
                logger.warning('%s: no answer from the store (%s); asking again', place, one_line(error))
            else:
                silent_since = None
                return answer

    return called


def _place(path: str, *args: Any) -> str:
    """What a request is about: gcsfs gives bucket and name as arguments, or inside the address of an upload."""
    upload = re.search(r'/b/([^/]+)/o(?:\?(?:.*&)?name=([^&]+))?', path)
    parts = args or (upload and filter(None, upload.groups())) or [path]
    return 'gs://' + urllib.parse.unquote('/'.join(map(str, parts)))

"""The checkpoints of a run: saved while it trains on, retired by rule, restored only if whole.

`save` copies the arrays to the host and returns; one background thread writes, sums and commits. What goes
wrong there comes up at the next `save`, `wait` or `close`, on all processes alike. Older checkpoints are
removed only after a newer one is committed.
"""

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tpu_llm.checkpoint import agree, commit, files, reader, retention, tensors
from tpu_llm.checkpoint import lanes as lane_table
from tpu_llm.checkpoint.fence import Fence, Superseded, order
from tpu_llm.checkpoint.files import CheckpointError, logger
from tpu_llm.checkpoint.saving import Saving


class Store:
    """The checkpoints that one start of a run writes. All processes call each method together."""

    def __init__(self, config: retention.Checkpoints, fence: Fence, attached: Mapping[str, bytes] | None = None):
        """`attached` files (the tokenizer's), by their path in the folder, go into every checkpoint."""
        self._config = config
        self._fence = fence
        self._attached = dict(attached or {})
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._last_step: int | None = None

    def save(
        self,
        step: int,
        arrays: Any,
        *,
        lanes: Mapping[str, np.ndarray],
        manifest: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves a tree of jax arrays and this process's rows of the lane table (see `lanes` and `manifest`).

        The arrays may be donated as soon as it returns. A step that this start has saved is not saved again.
        Raises CheckpointError for the save before, and with `wait` for this one; Superseded where a newer run
        took over.
        """
        self.wait()
        if step != self._last_step:
            self._pending = step, self._begin(step, arrays, lanes, manifest, metrics or {})
        if wait:
            self.wait()

    def _begin(
        self,
        step: int,
        arrays: Any,
        lanes: Mapping[str, np.ndarray],
        manifest: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> concurrent.futures.Future[None]:
        process = jax.process_index()
        documents = {lane_table.file_name(process): lane_table.encode(lanes)}
        if process == 0:
            saved = {'step': step, 'processes': jax.process_count(), 'tensors': tensors.describe(arrays)}
            documents |= {'manifest.json': json.dumps({**manifest, **saved}, indent=1).encode()}
            documents |= self._attached
        folder = commit.root(self._fence.workdir) / commit.folder_name(step, self._fence.token)
        return self._thread.submit(self._finish, Saving(folder, arrays, documents, metrics, self._fence))

    def _finish(self, saving: Saving) -> None:
        start = time.monotonic()
        try:
            saving.finish()
        except Superseded:
            raise
        except Exception:
            if jax.process_index() == 0:
                # What is half-written may be what filled the disk; if it cannot go, the first error says why.
                with contextlib.suppress(OSError, CheckpointError):
                    files.remove(saving.folder)
            raise
        if jax.process_index() == 0:
            logger.info('committed %s after %.1f s', saving.folder, time.monotonic() - start)
            try:
                self._retire()
            except Superseded:
                raise
            except (OSError, CheckpointError) as error:  # All that is kept too long is disk space.
                logger.warning('an old checkpoint could not be removed: %s', files.one_line(error))

    def _retire(self) -> None:
        """Removes what no rule keeps, and what older starts left half-written or damaged past its mark."""
        self._fence.check()
        workdir = self._fence.workdir
        stays = {checkpoint.folder for checkpoint in retention.kept(reader.committed(workdir), self._config)}
        for folder in commit.folders(workdir):
            _, token = commit.parse(folder)
            if folder not in stays and order(token) <= order(self._fence.token):
                files.remove(folder / commit.MARK)
                files.remove(folder)

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what went wrong, the same on every process."""
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        error = pending.exception()
        said = {
            'message': files.one_line(error) if error else '',
            'superseded': isinstance(error, Superseded),
        }
        heard = [json.loads(word) for word in agree.gather(json.dumps(said))]
        for word in heard:
            if word['superseded']:
                raise Superseded(word['message']) from error
        problems = list(dict.fromkeys(word['message'] for word in heard if word['message']))
        if problems:
            raise CheckpointError(
                f'{self._fence.workdir}: the checkpoint of step {step} was not saved: {"; ".join(problems)}; '
                'mend that and start again: those before it are untouched'
            ) from error
        self._last_step = step

    def steps(self) -> list[int]:
        """The steps of all committed checkpoints, in ascending order."""
        return sorted({checkpoint.step for checkpoint in reader.committed(self._fence.workdir)})

    def restore(self, like: Any, step: int | None = None) -> reader.Restored | None:
        """The newest whole checkpoint (of one step, if given); see `reader.find` and `reader.load`."""
        checkpoint = reader.find(self._fence.workdir, step)
        return reader.load(checkpoint, like) if checkpoint else None

    def __enter__(self) -> 'Store':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or jax.process_count() == 1:
            self.close()
        else:  # the other processes are in a step, not here to agree on how a save ended
            self._thread.shutdown(wait=False)

    def close(self) -> None:
        """Waits as `wait` does, then ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

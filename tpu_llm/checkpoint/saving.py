"""One save, from the copy of the arrays to the commit mark.

Every process goes through the same phases with a barrier after each, whether it failed or not, so that none
waits for one that gave up. A process that failed leaves no checksums, and without them process 0 does not
commit.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from tpu_llm.checkpoint import agree, checksums, commit, files, tensors
from tpu_llm.checkpoint.fence import Fence

_BARRIERS = itertools.count()  # A save that failed may be tried again, a barrier's name may not.


class Saving:
    """A save that has begun: the arrays are copied and are being written."""

    def __init__(
        self,
        folder: epath.Path,
        arrays: Any,
        documents: Mapping[str, bytes],  # this process's other files, by their path in the folder
        metrics: Mapping[str, float],
        fence: Fence,
    ):
        self.folder = folder
        self._documents = documents
        self._metrics = {name: float(value) for name, value in metrics.items()}
        self._fence = fence
        self._error: Exception | None = None
        try:
            self._writes = tensors.begin_write(folder, arrays)
        except Exception as error:  # `finish` raises it, after the barriers at which the other processes wait.
            self._error = error

    def finish(self) -> None:
        """Writes what remains, sums and commits; raises what went wrong on this process."""
        for phase in (self._write, self._join, self._sum, self._commit):
            if self._error is None:
                try:
                    phase()
                except Exception as error:
                    self._error = error
            agree.barrier(f'{self.folder.name}{phase.__name__}{next(_BARRIERS)}')
        if self._error:
            raise self._error

    def _write(self) -> None:
        for write in self._writes:
            write.result()
        for name, data in self._documents.items():
            files.write(self.folder / name, data)

    def _join(self) -> None:
        if jax.process_index() == 0:
            tensors.finish_write(self.folder)

    def _sum(self) -> None:
        checksums.write(self.folder, jax.process_index())

    def _commit(self) -> None:
        if jax.process_index() == 0:
            self._fence.check()
            commit.write_mark(self.folder, self._metrics, jax.process_count())

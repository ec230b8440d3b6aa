"""The lanes as a Grain dataset: read ahead by a thread, or divided among worker processes.

An element is this reader's rows of one step, with the state of their lanes after it. The state travels with
the rows, so it is right however far the readers run ahead.
"""

import dataclasses
import functools
import pickle
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from tpu_llm.arrays import Batch
from tpu_llm.data import lanes, packing

# Arrays below this size go through a pipe; shared memory costs more than it saves.
_SHARED = 1 << 20


Fill = Callable[[Sequence[Sequence[packing.Piece]], int, Sequence[int]], Batch]


class Rows(grain.IterDataset):
    """Endless; `make(table)` opens the sources and returns the walk of the table's lanes.

    `form(walk)` returns what makes a batch of packed rows, a step and the rows' numbers; without it they are filled in
    as they are.
    """

    def __init__(
        self,
        make: Callable[[lanes.Table], lanes.Walk],
        table: lanes.Table,
        *,
        plan: lanes.Plan,
        pad: int,
        form: Callable[[lanes.Walk], Fill] | None = None,
    ):
        super().__init__()
        self.make, self.table, self.plan, self.pad, self.form = make, table, plan, pad, form

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's call to divide a dataset among workers: worker i of n has the i-th of every n rows."""
        assert not sequential_slice
        rows = np.unique(self.table['lane'] % self.plan.global_batch)
        self.table = lanes.select(self.table, self.plan.of_rows(rows[sl].tolist()))

    def __iter__(self) -> '_RowsIterator':
        return _RowsIterator(self)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, rows: Rows):
        super().__init__()
        self._rows = rows
        self._walk: lanes.Walk | None = None
        self._fill: Fill = self._plain
        self._table = rows.table
        self._numbers = np.unique(rows.table['lane'] % rows.plan.global_batch).tolist()

    def __next__(self) -> dict[str, Any]:
        if self._walk is None:
            self._walk = self._rows.make(self._table)
            if self._rows.form is not None:
                self._fill = self._rows.form(self._walk)
        step = int(self._walk.state()['step'][0])
        batch = self._fill(self._walk.step(), step, self._numbers)
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return arrays | {'state': self._walk.state()}

    def _plain(self, packed: Sequence[Sequence[packing.Piece]], step: int, rows: Sequence[int]) -> Batch:
        del step, rows
        return packing.fill(packed, len(packed), self._rows.plan.seq_len, self._rows.pad)

    def get_state(self) -> lanes.Table:
        return self._walk.state() if self._walk else self._table

    def set_state(self, state: lanes.Table) -> None:
        self._table, self._walk = state, None


@runtime_checkable
class Closing(Protocol):
    """An iterator that holds a thread or processes until it is closed."""

    def __next__(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def read_ahead(rows: Rows, *, workers: int, prefetch: int) -> Closing:
    """Elements with all the lanes in each, `prefetch` of them made ahead by a thread or by each worker."""
    if workers == 0:
        return grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=prefetch).__iter__()
    if not flags.FLAGS.is_parsed():  # Grain's workers read flags; outside absl's main nobody parsed them
        flags.FLAGS.mark_as_parsed()
    # Workers get the sources in a file: Python hangs where a process dies before it has read what it was sent,
    # if that is more than a pipe holds (64 KiB).
    with tempfile.NamedTemporaryFile(prefix='tpu_llm-', delete=False) as file:
        pickle.dump((rows.make, rows.form), file)
    make, form = (functools.partial(_call, file.name, index) for index in range(2))
    sent = Rows(make, rows.table, plan=rows.plan, pad=rows.pad, form=rows.form and form)
    options = grain.experimental.DatasetOptions(min_shm_size=_SHARED)
    dataset = grain.experimental.WithOptionsIterDataset(sent, options)
    multi = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return Joined(dataset.mp_prefetch(multi, _deafen).__iter__(), workers, Path(file.name))


def _deafen(index: int, count: int) -> None:
    """Ctrl-C in a terminal reaches workers, too; the run needs them for the step after which it saves."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(file: str, index: int, argument: Any) -> Any:
    with open(file, 'rb') as stream:
        return pickle.load(stream)[index](argument)


class Joined:
    """Joins what the workers make of one step: row k of worker i is row i + k * workers."""

    def __init__(self, parts: grain.DatasetIterator, workers: int, file: Path):
        self._parts, self._workers, self._file = parts, workers, file

    def __next__(self) -> dict[str, Any]:
        parts = [next(self._parts) for _ in range(self._workers)]
        self._file.unlink(missing_ok=True)  # all workers have read it
        joined = {key: _interleave([part[key] for part in parts]) for key in parts[0] if key != 'state'}
        return joined | {'state': lanes.merge([part['state'] for part in parts])}

    def close(self) -> None:
        self._parts.close()
        self._file.unlink(missing_ok=True)


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    joined = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for i, part in enumerate(parts):
        joined[i :: len(parts)] = part
    return joined

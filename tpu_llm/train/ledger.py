"""Where a run's wall time went, over all its starts, and how much of it was productive.

A start charges its time to phases; nested phases charge the innermost only, and time outside any goes to
`other`, so the phases of a start add up to its wall time. Each start keeps one record in
`WORKDIR/ledger.jsonl` and rewrites it at every `flush()`: a kill loses what came after the last one.

Steps that a later start does again, because it resumed from an older checkpoint, were lost. They are found by
comparing the records, so nobody has to live long enough to report them.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

from etils import epath
from rich.console import Group
from rich.table import Table

from tpu_llm.train.metrics import read, replace_text
from tpu_llm.train.progress import clock

Phase = Literal['init', 'compile', 'data_wait', 'step', 'eval', 'save', 'restore', 'sample', 'rollout', 'reward']
PHASES = (*get_args(Phase), 'lost', 'other')
FILE = 'ledger.jsonl'


class Ledger:
    """The account of one start, from this object's creation. Without a workdir it keeps its record to itself.

    `token` is the start's fencing token. Not thread-safe: phases are those of the training loop's thread.
    """

    def __init__(self, workdir: epath.PathLike | None = None, *, token: str | None = None):
        self._path = epath.Path(workdir) / FILE if workdir is not None else None
        self._began = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
        self._token = token
        self._start_step: int | None = None  # not known until the checkpoint is restored
        self._end_step: int | None = None
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._charged = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Charges the block's time to `name`, except for what phases inside it take."""
        assert name in get_args(Phase), name
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @property
    def current(self) -> str:
        """The innermost open phase. Any thread may look."""
        return ['other', *self._open][-1]

    def seconds(self, *phases: Phase) -> float:
        """Seconds charged so far to these phases of this start; without names, to all."""
        self._charge()
        return sum(self._seconds.get(name, 0.0) for name in phases or self._seconds)

    def spent(self) -> dict[str, float]:
        """Seconds charged so far, by phase."""
        self._charge()
        return dict(self._seconds)

    def resumed(self, step: int) -> None:
        """This start continues from `step` (0: from scratch)."""
        self._start_step = self._end_step = step

    def finished(self, step: int) -> None:
        """`step` steps are done, whether or not a checkpoint holds them."""
        self._end_step = step

    def flush(self) -> None:
        """Writes this start's record, up to now, beside those of the other starts."""
        if self._path is None:
            return
        mine = self.record()
        before = read(self._path) if self._path.exists() else []
        others = [record for record in before if _identity(record) != _identity(mine)]
        lines = [json.dumps(record) + '\n' for record in [*others, mine]]
        replace_text(self._path, ''.join(lines))

    def record(self) -> dict[str, Any]:
        """What is written down: start and end step, host, seconds by phase."""
        self._charge()
        return {
            'start': self._began,
            'host': socket.gethostname(),
            'pid': os.getpid(),
            'token': self._token,
            'start_step': self._start_step,
            'end_step': self._end_step,
            'seconds': {name: round(self._seconds[name], 6) for name in PHASES if name in self._seconds},
        }

    def _charge(self) -> None:
        now = time.monotonic()
        name = self._open[-1] if self._open else 'other'
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged
        self._charged = now


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return record['start'], record['host'], record['pid']


# ---------------------------------------------------------------------------------------------------- goodput


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A run's time over all its starts."""

    starts: int
    steps: int  # the step that the run has reached
    lost_steps: int
    seconds: dict[str, float]  # every phase of PHASES; the time of lost steps is under `lost`, not `step`

    @property
    def wall(self) -> float:
        """Seconds during which a start was alive."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Productive step time over wall time: a step done twice counts once, all else counts against."""
        return self.seconds['step'] / self.wall if self.wall else 0.0


def summarize(records: list[dict[str, Any]]) -> Summary:
    """Adds up the records of a run's starts, in the order in which they were written.

    Of the steps [start, end) that a start did, those from the lowest step that any later start resumed at
    were lost; each is charged at that start's mean step time.
    """
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for record in records:
        for name, value in record['seconds'].items():
            seconds[name] += value
    trained = [record for record in records if record['start_step'] is not None]
    lost_steps, resumed = 0, float('inf')
    for record in reversed(trained):
        start, end = record['start_step'], record['end_step']
        lost = end - int(min(max(resumed, start), end))
        if lost:
            wasted = record['seconds'].get('step', 0.0) * lost / (end - start)
            seconds['step'] -= wasted
            seconds['lost'] += wasted
        lost_steps += lost
        resumed = min(resumed, start)
    steps = trained[-1]['end_step'] if trained else 0
    return Summary(starts=len(records), steps=steps, lost_steps=lost_steps, seconds=seconds)


def load(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of all starts, oldest first. Raises ValueError where the workdir has no ledger."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        raise ValueError(f'{path} does not exist: is {workdir} the workdir of a run?')
    return read(path)


def render(records: list[dict[str, Any]]) -> Group:
    """The tables that `python -m tpu_llm.train ledger WORKDIR` prints."""
    summary = summarize(records)
    phases = Table(title='Where the time went', title_justify='left')
    phases.add_column('phase')
    phases.add_column('seconds', justify='right')
    phases.add_column('share', justify='right')
    for name, seconds in summary.seconds.items():
        phases.add_row(name, f'{seconds:,.1f}', f'{seconds / (summary.wall or 1.0):.1%}')
    phases.add_section()
    phases.add_row('wall', f'{summary.wall:,.1f}', '100.0%')

    starts = Table(title='Starts', title_justify='left')
    for name in ('began (UTC)', 'host', 'token', 'steps', 'wall'):
        starts.add_column(name, justify='right' if name in ('token', 'steps', 'wall') else 'left')
    for record in records:
        starts.add_row(
            record['start'][:19].replace('T', ' '),
            record['host'],
            '' if record['token'] is None else str(record['token']),
            '' if record['start_step'] is None else f'{record["start_step"]:,} → {record["end_step"]:,}',
            clock(sum(record['seconds'].values())),
        )
    verdict = (
        f'goodput {summary.goodput:.1%}: productive step time over wall time; '
        f'{summary.steps:,} steps, {summary.lost_steps:,} done twice'
    )
    return Group(phases, starts, verdict)

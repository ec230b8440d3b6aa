"""What a person sees of a sweep: a live table on a terminal, a line for each start and end everywhere else."""

import collections
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tpu_llm.scaling.progress import Look, Progress
from tpu_llm.scaling.sweep import Job
from tpu_llm.scaling.table import last_loss
from tpu_llm.train.progress import clock

LOOK, LINE = 1.0, 60.0  # seconds between two pictures on a terminal, and two lines elsewhere
_STYLES = {'finished': 'green', 'running': 'bold', 'failed': 'red', 'diverged': 'yellow', 'waiting': 'dim'}
_FIRST = ('running', 'failed', 'diverged', 'finished', 'waiting')  # where a terminal is too short for all
_REST = 8  # lines of a terminal that are not runs


class Board:
    """Where every run of a sweep is. `Shown` and `Lines` say it."""

    def __init__(self, jobs: Sequence[Job], status: dict[str, str]):
        self.jobs, self.status = jobs, dict(status)
        self.progress = Progress(jobs)
        self.here = {job.name for job in jobs if status[job.name] == 'waiting'}  # what this start has to do

    def counts(self) -> str:
        found = collections.Counter(self.status.values())
        return ', '.join(f'{found[status]} {status}' for status in _STYLES if found[status])

    def remaining(self, looks: dict[str, Look]) -> str:
        done = {name: 1.0 for name in self.here if self.status[name] not in ('running', 'waiting')}
        done |= {name: look.share for name, look in looks.items()}
        left = self.progress.remaining(done, {name: 1 - done.get(name, 0.0) for name in self.here})
        return '' if left is None else f', about {clock(left)} left'

    def looks(self) -> dict[str, Look]:
        return {job.name: self.progress.look(job) for job in self.jobs if self.status[job.name] == 'running'}

    def move(self, job: Job, status: str) -> None:
        if status == 'running':
            self.progress.begin(job)
        self.status[job.name] = status


class Shown:
    """The live table: the runs at work, and as many others as the terminal has room for."""

    def __init__(self, board: Board, console: Console):
        self.board, self.console = board, console
        self._looked = float('-inf')
        self._ends: dict[str, Look] = {}
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> 'Shown':
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._draw()
        self._live.stop()

    def changed(self, job: Job, status: str, reason: str = '') -> None:
        self.board.move(job, status)
        if reason:
            self.console.print(f'{job.name} {status}: {reason}', markup=False, highlight=False)
        if status != 'running':
            self._ends[job.name] = self.board.progress.look(job)
        self._draw()

    def tick(self) -> None:
        if time.monotonic() - self._looked > LOOK:
            self._draw()

    def _draw(self) -> None:
        self._looked = time.monotonic()
        looks = self.board.looks()
        table = Table(box=None)
        for column in ('run', 'status', 'step', 'loss', 'time left'):
            table.add_column(column, justify='left' if column in ('run', 'status') else 'right')
        ordered = sorted(self.board.jobs, key=lambda job: _FIRST.index(self.board.status[job.name]))
        kept = {job.name for job in ordered[: max(3, self.console.height - _REST)]}
        for job in self.board.jobs:
            if job.name in kept:
                self._add(table, job, looks.get(job.name) or self._ends.get(job.name))
        more = len(ordered) - len(kept)
        words = self.board.counts() + self.board.remaining(looks) + (f' ({more} not shown)' if more else '')
        self._live.update(Group(table, Text(words)), refresh=True)

    def _add(self, table: Table, job: Job, look: Look | None) -> None:
        status = self.board.status[job.name]
        step = '' if look is None or not look.step else f'{look.step:,}' + (f'/{look.steps:,}' if look.steps else '')
        loss = '' if look is None or look.loss is None else f'{look.loss:.4f}'
        left = '' if look is None or look.left is None or status != 'running' else clock(look.left)
        table.add_row(Text(job.name), Text(status, _STYLES[status]), step, loss, left)


class Lines:
    """A line for each start and end, and once a minute how far all is."""

    def __init__(self, board: Board, console: Console):
        self.board, self.console = board, console
        self._said = time.monotonic()

    def __enter__(self) -> 'Lines':
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def changed(self, job: Job, status: str, reason: str = '') -> None:
        self.board.move(job, status)
        last = last_loss(job) if status == 'finished' else {}
        loss = f', {last["loss_of"]} {last["loss"]:.4f}' if last else ''
        self._say(f'{job.name} {status}{loss}' + (f': {reason}' if reason else ''))

    def tick(self) -> None:
        if time.monotonic() - self._said > LINE:
            looks = self.board.looks()
            self._say(self.board.counts() + self.board.remaining(looks))

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(f'{time.strftime("%H:%M:%S")}  {text}', markup=False, highlight=False, soft_wrap=True)


class Views:
    """Several views as one."""

    def __init__(self, *views):
        self.views = views

    def changed(self, job: Job, status: str, reason: str = '') -> None:
        for view in self.views:
            view.changed(job, status, reason)

    def tick(self) -> None:
        for view in self.views:
            view.tick()

"""Takes a sweep to its end on an engine: starts what there is room for, hears how runs ended, tries lost ones again.

An engine runs jobs somewhere: `local.Pool` in processes of this machine, `jobs.*` elsewhere. However a run ended is
read from its folder, so an engine only says that it has.
"""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from tpu_llm.scaling import sweep
from tpu_llm.scaling.sweep import Job, Try

PAUSE = 0.05  # seconds between two looks
Status = Literal['finished', 'failed', 'diverged', 'running', 'waiting']


class Engine(Protocol):
    """Where runs are run. `left` says what becomes of runs at work when the sweep is stopped."""

    left: str

    def room(self, job: Job) -> bool:
        """Whether the job can start now."""
        ...

    def start(self, job: Job) -> None: ...

    def ended(self) -> list[tuple[str, str]]:
        """The names of runs that ended since it was last asked, each with '' where the run has written down how, and
        otherwise with what became of its process.
        """
        ...

    def stop(self) -> None:
        """Ends what is running, after it has saved, and everything else that the engine holds."""


class View(Protocol):
    """Whoever watches."""

    def changed(self, job: Job, status: Status, reason: str = '') -> None: ...

    def tick(self) -> None:
        """Called many times a second."""


class Drive:
    """The jobs of a sweep, and what has become of each."""

    def __init__(self, jobs: Sequence[Job], engine: Engine, view: View, retries: int):
        self.jobs = {job.name: job for job in jobs}
        self.engine, self.view, self.retries = engine, view, retries
        self.status: dict[str, Status] = {job.name: status_of(job) for job in jobs}
        self._before: dict[str, int] = {}  # tries of a run before this one

    def run(self) -> None:
        """Returns when every run has finished, diverged or failed for good; stops the engine however it ends."""
        waiting = collections.deque(job for job in self.jobs.values() if self.status[job.name] == 'waiting')
        left = dict.fromkeys(self.jobs, self.retries)
        try:
            while waiting or 'running' in self.status.values():
                while waiting and self.engine.room(waiting[0]):
                    self._start(waiting.popleft())
                for job, last in self._ended():
                    if last.status in sweep.AGAIN and left[job.name]:
                        left[job.name] -= 1
                        waiting.append(job)
                        self._now(job, 'waiting', f'{last.reason}; tried again, {left[job.name]} more after that')
                    else:
                        self._now(job, final(last), last.reason)
                self.view.tick()
                time.sleep(PAUSE)
        finally:
            self.engine.stop()
            for job in self.jobs.values():
                if self.status[job.name] == 'running':
                    self._now(job, status_of(job))

    def _start(self, job: Job) -> None:
        self._before[job.name] = len(sweep.tries(job.folder))
        self.engine.start(job)
        self._now(job, 'running')

    def _ended(self) -> Iterator[tuple[Job, Try]]:
        for name, lost in self.engine.ended():
            job = self.jobs[name]
            if lost and len(sweep.tries(job.folder)) == self._before[name]:
                sweep.record(job, Try(status='lost', reason=lost))
            yield job, sweep.tries(job.folder)[-1]

    def _now(self, job: Job, status: Status, reason: str = '') -> None:
        self.status[job.name] = status
        self.view.changed(job, status, reason)


def status_of(job: Job) -> Status:
    """What a sweep that begins makes of a run that is there: what failed is worth a try again."""
    if not sweep.is_done(job):
        return 'waiting'
    return final(sweep.tries(job.folder)[-1])


def final(last: Try) -> Status:
    if last.status == 'finished' or last.status == 'diverged':
        return last.status
    return 'failed'

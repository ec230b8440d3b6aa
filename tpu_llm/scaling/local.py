"""Runs in processes of this machine: a pool of workers, within its cores and its memory.

Each worker has cores of its own (its affinity, by which XLA and NumPy choose their threads) and does one run after
another, so that jax is imported once. A worker that dies costs its run only; the next run gets a new one.
"""

import contextlib
import dataclasses
import glob
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tpu_llm.scaling.memory import need
from tpu_llm.scaling.sweep import Job

PATIENCE = 120.0  # seconds in which a run that is to stop must have saved
COMPILED = 'compiled'
_GONE = {
    signal.SIGKILL: 'the kernel does so where memory is short: fewer --processes, or a --memory budget',
    signal.SIGABRT: 'see its log',
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What runs may take of this machine."""

    processes: int
    cores: tuple[int, ...]
    memory: float  # GiB in all

    def of(self, slot: int) -> list[int]:
        """The cores of a worker: an equal share, or one that others have too."""
        share = len(self.cores) // self.processes
        if not share:
            return [self.cores[slot % len(self.cores)]]
        return list(self.cores[slot * share : (slot + 1) * share])


def budget(runs: int, processes: int = 0, memory: float = 0.0) -> Budget:
    """What there is: by default a process a core, or one alone where there is an accelerator, which no two can hold;
    and 0.8 of the memory that is free.
    """
    there = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count() or 1)
    cores = tuple(sorted(there))
    most = 1 if _accelerated() else len(cores)
    return Budget(processes=processes or max(1, min(most, runs)), cores=cores, memory=memory or 0.8 * _free())


def _accelerated() -> bool:
    kinds = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')
    return os.environ.get('JAX_PLATFORMS') != 'cpu' and any(map(glob.glob, kinds))


def _free() -> float:
    """GiB; of a machine that does not say so, no end of it."""
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
    except OSError:
        return float('inf')
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith('MemAvailable'))


class Worker:
    """A process, the run that it works on, and the most that it was given to hold."""

    def __init__(self, command: Sequence[str], cores: Sequence[int], env: dict[str, str], log: Path, slot: int):
        words = [*command, f'--cores={",".join(map(str, cores))}']
        with open(log, 'ab') as errors:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, start_new_session=True
            )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.slot, self.job, self.holds = slot, None, 0.0
        self._read = b''

    def give(self, job: Job, gib: float) -> None:
        assert self.process.stdin is not None
        self.job, self.holds = job, max(self.holds, gib)
        with contextlib.suppress(BrokenPipeError):  # it died; `ended` tells
            self.process.stdin.write(f'{job.name}\n'.encode())
            self.process.stdin.flush()

    def ended(self) -> str | None:
        """None while it works; '' once the run has written down how it ended; otherwise what became of the worker."""
        assert self.job is not None
        assert self.process.stdout is not None
        code = self.process.poll()  # asked before reading, so that no last word is missed
        self._read += self.process.stdout.read() or b''
        if self.job.name.encode() in self._read.split(b'\n')[:-1]:
            self._read, self.job = b'', None
            return ''
        if code is None:
            return None
        if code >= 0:
            return f'its process ended with exit {code}'
        name = signal.Signals(-code).name
        return f'its process was ended by {name}' + (f'; {why}' if (why := _GONE.get(signal.Signals(-code))) else '')

    def close(self) -> None:
        """An idle worker ends; one at work saves first."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


class Pool:
    """The engine of one machine. `command` starts a worker; what workers print between runs goes to a file."""

    left = 'the runs at work have saved, and the same command goes on'

    def __init__(self, command: Sequence[str], budget: Budget, workdir: Path):
        self.command, self.budget, self.workdir = list(command), budget, workdir
        self.env = {
            'JAX_COMPILATION_CACHE_DIR': str((workdir / COMPILED).absolute()),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            **os.environ,
        }
        self.workers: list[Worker] = []
        self._needs: dict[str, float] = {}

    def room(self, job: Job) -> bool:
        """Whether it can start now: a worker or a place for one, and memory beside the others; alone it always can."""
        working = [worker for worker in self.workers if worker.job]
        if len(working) == self.budget.processes:
            return False
        idle, gib = self._idle(), self._need(job)
        while idle and self._held(idle[0], gib) > self.budget.memory:
            self._retire(idle.pop())  # a heap that has grown is not given back
        return not working or self._held(idle[0] if idle else None, gib) <= self.budget.memory

    def start(self, job: Job) -> None:
        idle = self._idle()
        worker = idle[0] if idle else self._new()
        worker.give(job, self._need(job))

    def ended(self) -> list[tuple[str, str]]:
        """The runs that ended since, each with why, where they have not written that down themselves."""
        over = []
        for worker in list(self.workers):
            job = worker.job
            if job and (why := worker.ended()) is not None:
                over.append((job.name, why))
            if worker.process.poll() is not None:
                self.workers.remove(worker)
        return over

    def stop(self) -> None:
        """Ends all workers, those at work after they have saved; kills what does not."""
        limit = time.monotonic() + PATIENCE
        try:
            for worker in self.workers:
                worker.close()
            while any(worker.process.poll() is None for worker in self.workers) and time.monotonic() < limit:
                time.sleep(0.05)
        finally:
            for worker in self.workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()
            self.workers = []

    def _need(self, job: Job) -> float:
        if job.name not in self._needs:
            self._needs[job.name] = need(job.config)
        return self._needs[job.name]

    def _idle(self) -> list[Worker]:
        """Those that wait, the one that holds most first."""
        waiting = [worker for worker in self.workers if not worker.job and worker.process.poll() is None]
        return sorted(waiting, key=lambda worker: -worker.holds)

    def _held(self, takes: Worker | None, gib: float) -> float:
        """GiB of all workers once this one has taken a run; of a new one (None) with its own."""
        others = sum(worker.holds for worker in self.workers if worker is not takes)
        return others + max(gib, takes.holds if takes else 0.0)

    def _new(self) -> Worker:
        self.workers = [worker for worker in self.workers if worker.job or worker.process.poll() is None]
        used = {worker.slot for worker in self.workers}
        slot = next(slot for slot in range(self.budget.processes) if slot not in used)
        self.workdir.mkdir(parents=True, exist_ok=True)
        worker = Worker(self.command, self.budget.of(slot), self.env, self.workdir / 'workers.txt', slot)
        self.workers.append(worker)
        return worker

    def _retire(self, worker: Worker) -> None:
        worker.close()
        worker.process.wait()
        self.workers.remove(worker)

"""What happens in the process of a run: one run, or one after another as they are named on standard input.

A worker imports jax once for many runs. It reads `NAME` lines and answers each with the same line when that run has
ended; how, stands in the run's folder. What a run prints goes to `log.txt` there. Where standard input ends, the worker
ends: at once if it is idle, else after its run has saved (SIGTERM, as of a preemption). So a sweep that is stopped, or
killed, leaves no process behind.
"""

import contextlib
import functools
import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.parallel import deaths
from tpu_llm.scaling import shared, sweep
from tpu_llm.scaling.sweep import Job, Try
from tpu_llm.train import metrics
from tpu_llm.train.watch import Diverged

LOG = 'log.txt'
READY = 'ready'
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def attempt(job: Job, before: Callable[[], None] = lambda: None) -> Try:
    """Runs it in this process and says how it ended; what was wrong is printed on the error stream, too."""
    start = time.monotonic()
    try:
        before()
        job.config.main(str(job.folder))
    except Exception as error:
        return judged(job, error, start)
    return judged(job, None, start)


def judged(job: Job, error: Exception | None, start: float) -> Try:
    """How a try ended that began at `start` (of the monotonic clock), by what it raised and what it left."""

    def ended(status: sweep.Ended, reason: str = '') -> Try:
        return Try(status=status, reason=' '.join(reason.split()), seconds=round(time.monotonic() - start, 3))

    if isinstance(error, (ConfigError, Diverged)):
        print('error:', error, file=sys.stderr)
        return ended('diverged' if isinstance(error, Diverged) else 'refused', str(error))
    if error:
        traceback.print_exception(error)
        return ended('failed', f'{type(error).__name__}: {error}')
    if not sweep.ended(job.config, job.folder):
        return ended('stopped', 'it was asked to stop, saved, and goes on from there')
    if bad := _not_finite(job):
        return ended('diverged', bad)
    return ended('finished')


def exit_status(error: BaseException | None) -> int:
    """Of a process that runs one job: as launch/run.py's, but for a run that diverged, which came to its end."""
    if error is None or isinstance(error, Diverged):
        return 0
    return deaths.LOST if isinstance(error, deaths.LostHost) else 2 if isinstance(error, ConfigError) else 1


def _not_finite(job: Job) -> str:
    """What is no finite number at the end of a run that went through all its steps; empty where all is well."""
    for stage, _, folder in sweep.trained(job.config, job.folder):
        lines = [line for line in metrics.read(folder / 'metrics.jsonl') if 'loss' in line]
        if lines and not abs(lines[-1]['loss']) < float('inf'):
            where = f'stage {stage}: ' if stage else ''
            return f'{where}the loss is {lines[-1]["loss"]} at step {lines[-1]["step"]}, the last that is logged'
    return ''


def serve(jobs: Mapping[str, Job], common: Path) -> None:
    """Works until standard input ends; `common` is the folder of what runs share."""
    answers, errors = os.fdopen(os.dup(_STDOUT), 'w', buffering=1), os.dup(_STDERR)
    _redirect(errors)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(names, busy), daemon=True).start()
    print(READY, file=answers)
    while name := names.get():
        busy.set()
        job = jobs[name]
        with _into(job.folder / LOG, errors):
            print(f'── {time.strftime("%Y-%m-%d %H:%M:%S")}  {name}', flush=True)
            sweep.record(job, attempt(job, functools.partial(prepare, job, common)))
        busy.clear()
        print(name, file=answers)
        jax.clear_caches()
        gc.collect()


def prepare(job: Job, common: Path) -> None:
    """Gives a run on this machine what the others have made."""
    shared.share(job.config, common)
    shared.prepare(job.config, Path(job.folder), common)


@contextlib.contextmanager
def _into(log: epath.Path, errors: int) -> Iterator[None]:
    """What this process prints, its libraries and children included, at the end of the file; afterwards to `errors`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'ab', buffering=0) as file:
        _redirect(file.fileno())
    try:
        yield
    finally:
        _redirect(errors)


def _redirect(file: int) -> None:
    for stream, number in ((sys.stdout, _STDOUT), (sys.stderr, _STDERR)):
        stream.flush()
        os.dup2(file, number)


def _listen(names: 'queue.SimpleQueue[str]', busy: threading.Event) -> None:
    """Hands on what is asked for; '' at the end."""
    rest = b''
    while read := os.read(_STDIN, 1 << 16):
        *lines, rest = (rest + read).split(b'\n')
        for line in lines:
            names.put(line.decode())
    names.put('')
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
